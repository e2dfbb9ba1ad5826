//! The handshake as a state machine without I/O: bytes in, bytes out, and a verdict ("Handshake", fixed newstyle only).
//!
//! ```text
//! greeting sent -> client flags -> option* -> GO / EXPORT_NAME -> transmission
//!                                         \-> ABORT, garbage, a bound passed -> close
//! ```
//! What a client can make this hold: one option's data, at most [`MAX_OPTION_BYTES`], and the replies to
//! [`MAX_OPTIONS`].

use crate::handover::{HandshakeState, Step};
use crate::proto::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, MAX_STRING_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, info, opt, rep,
};
use crate::request::{MAX_PAYLOAD_BYTES, take, transmission_flags};
use crate::service::BlockGeometry;

/// Longest data of an option that is looked at: a name of 4,096 bytes and two thousand information requests.
pub(crate) const MAX_OPTION_BYTES: u32 = 8192;
/// Longest data of an option that is read and thrown away, with `NBD_REP_ERR_TOO_BIG` for an answer; beyond, the
/// session ends.
pub(crate) const MAX_OPTION_SKIP_BYTES: u32 = 64 * 1024;
/// Options that one client may send before the session ends ("denial of service", section "Termination of the
/// session").
pub(crate) const MAX_OPTIONS: u32 = 64;

const OPTION_HEADER_BYTES: usize = 16;

/// What the handshake asks of the export behind it.
pub(crate) trait Exports {
    /// The name beside the empty one that reaches the export.
    fn name(&self) -> &str;
    /// A line for people (`NBD_INFO_DESCRIPTION`).
    fn description(&self) -> &str;
    /// `None` when it is going away.
    fn geometry(&self) -> Option<BlockGeometry>;
    /// Opens the export for this connection: from here on there is a handle.
    ///
    /// # Errors
    /// A line for the client.
    fn open(&mut self) -> Result<(), String>;
}

/// What happens to the connection next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// More input is wanted.
    More,
    /// Output is complete; the transmission phase begins with the byte after the consumed ones.
    Enter { structured: bool },
    /// Send what there is, then close.
    Close(&'static str),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, length: u32 },
    Skip { left: u32 },
}

/// One connection's handshake.
#[derive(Debug)]
pub(crate) struct Handshake {
    state: State,
    /// Bytes of the message that is not complete yet.
    partial: Vec<u8>,
    /// To be sent, in order; taken by the connection.
    pub(crate) output: Vec<u8>,
    options: u32,
    no_zeroes: bool,
    structured: bool,
}

impl Handshake {
    /// With the server's greeting in `output`.
    pub(crate) fn new() -> Handshake {
        let mut output = Vec::with_capacity(256);
        output.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        output.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Handshake {
            state: State::ClientFlags,
            partial: Vec::new(),
            output,
            options: 0,
            no_zeroes: false,
            structured: false,
        }
    }

    /// Where it is, for another process.
    pub(crate) fn export(&self) -> HandshakeState {
        let (step, option, length) = match self.state {
            State::ClientFlags => (Step::ClientFlags, 0, 0),
            State::OptionHeader => (Step::OptionHeader, 0, 0),
            State::OptionData { option, length } => (Step::OptionData, option, length),
            State::Skip { left } => (Step::Skip, 0, left),
        };
        let (options, no_zeroes, structured) = (self.options, self.no_zeroes, self.structured);
        HandshakeState { step, option, length, partial: self.partial.clone(), options, no_zeroes, structured }
    }

    /// One that another process began, with nothing in `output`; `None` for what cannot be.
    pub(crate) fn adopt(state: HandshakeState) -> Option<Handshake> {
        let HandshakeState { step, option, length, partial, options, no_zeroes, structured } = state;
        let (state, wanted) = match step {
            Step::ClientFlags => (State::ClientFlags, 4),
            Step::OptionHeader => (State::OptionHeader, OPTION_HEADER_BYTES),
            Step::OptionData => (State::OptionData { option, length }, length as usize),
            Step::Skip => (State::Skip { left: length }, OPTION_HEADER_BYTES),
        };
        let bounded = length <= MAX_OPTION_SKIP_BYTES && (step != Step::OptionData || length <= MAX_OPTION_BYTES);
        let fits = partial.is_empty() || partial.len() < wanted;
        let output = Vec::new();
        (bounded && fits).then_some(Handshake { state, partial, output, options, no_zeroes, structured })
    }

    /// Takes bytes from the client; says how many, and what now. Unless the verdict is [`Verdict::More`], bytes may be
    /// left over.
    pub(crate) fn feed(&mut self, mut input: &[u8], exports: &mut dyn Exports) -> (usize, Verdict) {
        let offered = input.len();
        loop {
            if let State::Skip { left } = self.state {
                let now = input.len().min(left as usize);
                input = &input[now..];
                let left = left - now as u32;
                self.state = if left == 0 { State::OptionHeader } else { State::Skip { left } };
                if left > 0 {
                    return (offered, Verdict::More);
                }
            }
            let wanted = match self.state {
                State::ClientFlags => 4,
                State::OptionHeader | State::Skip { .. } => OPTION_HEADER_BYTES,
                State::OptionData { length, .. } => length as usize,
            };
            let now = input.len().min(wanted - self.partial.len());
            self.partial.extend_from_slice(&input[..now]);
            input = &input[now..];
            if self.partial.len() < wanted {
                return (offered, Verdict::More);
            }
            let message = std::mem::take(&mut self.partial);
            let verdict = self.message(&message, exports);
            self.partial = message;
            self.partial.clear();
            if verdict != Verdict::More {
                return (offered - input.len(), verdict);
            }
        }
    }

    fn message(&mut self, message: &[u8], exports: &mut dyn Exports) -> Verdict {
        match self.state {
            State::ClientFlags => self.client_flags(message),
            State::OptionHeader | State::Skip { .. } => self.option_header(message),
            State::OptionData { option, .. } => {
                self.state = State::OptionHeader;
                self.option(option, message, exports)
            }
        }
    }

    /// "Client flags": an unknown flag ends the session. A client that does not say fixed newstyle may send
    /// `NBD_OPT_EXPORT_NAME` alone; answering its other options all the same is what section "Client flags" allows.
    fn client_flags(&mut self, message: &[u8]) -> Verdict {
        let Some((flags, _)) = take::<4>(message) else { return Verdict::Close("short client flags") };
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return Verdict::Close("unknown client flags");
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.state = State::OptionHeader;
        Verdict::More
    }

    fn option_header(&mut self, message: &[u8]) -> Verdict {
        let fields = take::<8>(message).and_then(|(magic, rest)| {
            take::<4>(rest).and_then(|(option, rest)| Some((magic, option, take::<4>(rest)?.0)))
        });
        let Some((magic, option, length)) = fields else { return Verdict::Close("short option") };
        if u64::from_be_bytes(magic) != OPTION_MAGIC {
            return Verdict::Close("not an option");
        }
        let (option, length) = (u32::from_be_bytes(option), u32::from_be_bytes(length));
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Verdict::Close("too many options");
        }
        if length > MAX_OPTION_SKIP_BYTES || (length > MAX_OPTION_BYTES && option == opt::EXPORT_NAME) {
            return Verdict::Close("option too long");
        }
        if length > MAX_OPTION_BYTES {
            self.reply(option, rep::ERR_TOO_BIG, b"option too long");
            self.state = State::Skip { left: length };
            return Verdict::More;
        }
        self.state = State::OptionData { option, length };
        Verdict::More
    }

    fn option(&mut self, option: u32, data: &[u8], exports: &mut dyn Exports) -> Verdict {
        match option {
            opt::EXPORT_NAME => return self.export_name(data, exports),
            opt::ABORT => {
                self.reply(option, rep::ACK, &[]);
                return Verdict::Close("aborted by the client");
            }
            opt::LIST if data.is_empty() => {
                let name = exports.name().as_bytes();
                let mut server = Vec::with_capacity(4 + name.len());
                server.extend_from_slice(&(name.len() as u32).to_be_bytes());
                server.extend_from_slice(name);
                self.reply(option, rep::SERVER, &server);
                self.reply(option, rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY => self.reply(option, rep::ERR_INVALID, b"this option takes no data"),
            opt::INFO | opt::GO => return self.info_or_go(option, data, exports),
            opt::STARTTLS => self.reply(option, rep::ERR_POLICY, b"no TLS: this server listens locally only"),
            _ => self.reply(option, rep::ERR_UNSUP, b"unknown option"),
        }
        Verdict::More
    }

    /// `NBD_OPT_EXPORT_NAME`: cannot fail but by closing.
    fn export_name(&mut self, name: &[u8], exports: &mut dyn Exports) -> Verdict {
        if !is_ours(name, exports) {
            return Verdict::Close("unknown export");
        }
        let (Some(geometry), Ok(())) = (exports.geometry(), exports.open()) else {
            return Verdict::Close("the export cannot be opened");
        };
        self.output.extend_from_slice(&geometry.capacity_bytes.to_be_bytes());
        self.output.extend_from_slice(&transmission_flags(&geometry, self.structured).to_be_bytes());
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; 124]);
        }
        Verdict::Enter { structured: self.structured }
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn info_or_go(&mut self, option: u32, data: &[u8], exports: &mut dyn Exports) -> Verdict {
        let Some((name, wanted)) = parse_info(data) else {
            self.reply(option, rep::ERR_INVALID, b"malformed request");
            return Verdict::More;
        };
        if !is_ours(name, exports) {
            self.reply(option, rep::ERR_UNKNOWN, b"no such export");
            return Verdict::More;
        }
        let Some(geometry) = exports.geometry() else {
            self.reply(option, rep::ERR_SHUTDOWN, b"the export is going away");
            return Verdict::More;
        };
        if option == opt::GO
            && let Err(message) = exports.open()
        {
            self.reply(option, rep::ERR_SHUTDOWN, clip(&message));
            return Verdict::More;
        }
        let mut export = [0; 12];
        export[..2].copy_from_slice(&info::EXPORT.to_be_bytes());
        export[2..10].copy_from_slice(&geometry.capacity_bytes.to_be_bytes());
        export[10..].copy_from_slice(&transmission_flags(&geometry, self.structured).to_be_bytes());
        self.reply(option, rep::INFO, &export);
        // Sent whether asked for or not: a client may use it only if it asked ("NBD_OPT_INFO"), and one that did not is
        // told by NBD_EINVAL.
        self.reply(option, rep::INFO, &block_size(&geometry));
        for (kind, text) in [(info::NAME, exports.name()), (info::DESCRIPTION, exports.description())] {
            if wanted.chunks_exact(2).any(|w| w == kind.to_be_bytes()) {
                let mut payload = kind.to_be_bytes().to_vec();
                payload.extend_from_slice(clip(text));
                self.reply(option, rep::INFO, &payload);
            }
        }
        self.reply(option, rep::ACK, &[]);
        if option == opt::GO { Verdict::Enter { structured: self.structured } } else { Verdict::More }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.output.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&kind.to_be_bytes());
        self.output.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.output.extend_from_slice(data);
    }
}

/// The empty name is the default export.
fn is_ours(name: &[u8], exports: &dyn Exports) -> bool {
    name.is_empty() || name == exports.name().as_bytes()
}

fn clip(text: &str) -> &[u8] {
    let mut end = text.len().min(MAX_STRING_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}

/// Name and raw list of information requests; `None` when lengths do not add up.
fn parse_info(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = take::<4>(data)?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let (name, rest) = rest.split_at_checked(length)?;
    let (count, wanted) = take::<2>(rest)?;
    (wanted.len() == 2 * usize::from(u16::from_be_bytes(count))).then_some((name, wanted))
}

/// `NBD_INFO_BLOCK_SIZE`: minimum, preferred, maximum payload ("Size constraints").
fn block_size(geometry: &BlockGeometry) -> [u8; 14] {
    let minimum = geometry.logical_block_bytes;
    let preferred = geometry.physical_block_bytes.clamp(4096.max(minimum), 1 << 20);
    let preferred = if preferred.is_power_of_two() { preferred } else { 4096.max(minimum) };
    let mut payload = [0; 14];
    payload[..2].copy_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    payload[2..6].copy_from_slice(&minimum.to_be_bytes());
    payload[6..10].copy_from_slice(&preferred.to_be_bytes());
    payload[10..].copy_from_slice(&MAX_PAYLOAD_BYTES.to_be_bytes());
    payload
}

#[cfg(test)]
pub(crate) mod tests;
