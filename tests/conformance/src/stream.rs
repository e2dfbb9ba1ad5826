//! What has to hold of consoles. The other side sends back what it is sent, on the same port.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{Arrivals, IoError, IoOp};

use crate::bed::{Class, Lever, Wish};
use crate::client::{Ask, bytes};
use crate::{Case, Client, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "the_ports_are_the_devices", wish: Wish::of, check: ports },
    Case { name: "bytes_come_back_once_and_in_order", wish: Wish::of, check: paste },
    Case { name: "bytes_come_back_over_a_plain_ring", wish: Wish::plain_ring, check: paste },
    Case { name: "bytes_come_back_over_a_small_ring", wish: Wish::small_ring, check: paste },
    Case { name: "two_ports_do_not_mix", wish: two_ports, check: two_ports_apart },
    Case { name: "writes_that_cannot_be_are_refused_and_harm_nothing", wish: Wish::of, check: impossible_writes },
    Case { name: "with_nobody_reading_the_sender_waits_and_nothing_is_lost", wish: Wish::of, check: nobody_reads },
    Case { name: "a_port_is_closed_and_opened_on_this_side", wish: Wish::of, check: closed_here },
    Case { name: "a_port_is_closed_and_opened_on_the_other_side", wish: Wish::with_levers, check: closed_there },
    Case { name: "the_size_of_the_terminal_is_in_the_offer", wish: Wish::with_levers, check: size },
    Case { name: "a_port_comes_and_goes", wish: Wish::with_levers, check: comes_and_goes },
];

/// Bytes of a paste.
const PASTE_BYTES: usize = 256 << 10;
/// Writes on their way at a time.
const WINDOW: usize = 16;

fn two_ports(class: Class) -> Wish {
    Wish { ports: 2, ..Wish::of(class) }
}

fn write(port: u32, data: &[u8]) -> Ask {
    Ask::payload(IoOp::Send, port.into(), data)
}

/// Takes what arrived behind `came`, waiting a little if there is nothing; whether there was something.
fn read(client: &Client, came: &mut Vec<u8>) -> anyhow::Result<bool> {
    let mut arrivals = Arrivals::new();
    client.receive(Duration::from_millis(5), &mut arrivals);
    for arrival in arrivals.iter() {
        came.extend(bytes(arrival)?);
    }
    Ok(!arrivals.is_empty())
}

/// Waits until all of `sent` has come back, and nothing else.
fn comes_back(fixture: &Fixture<'_>, client: &Client, sent: &[u8]) -> anyhow::Result<()> {
    let (mut came, mut deadline) = (Vec::new(), Instant::now() + fixture.patience());
    while came.len() < sent.len() {
        if read(client, &mut came)? {
            deadline = Instant::now() + fixture.patience();
        }
        ensure!(Instant::now() < deadline, "{} bytes of {} came", came.len(), sent.len());
    }
    is_same(&came, sent)
}

fn is_same(came: &[u8], sent: &[u8]) -> anyhow::Result<()> {
    let wrong = came.iter().zip(sent).position(|(came, sent)| came != sent);
    ensure!(wrong.is_none() && came.len() <= sent.len(), "{} of {} bytes, from {wrong:?} on", came.len(), sent.len());
    Ok(())
}

/// Sends bytes drawn from `seed` in pieces of any length, and wants them back.
fn exchange(fixture: &Fixture<'_>, port: u32, seed: u64, total: usize) -> anyhow::Result<()> {
    let mut client = fixture.receiver(usize::from(fixture.port(port)?.set))?;
    let longest = fixture.streams()?.max_write_bytes as usize;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sent = vec![0; total];
    random.fill(&mut sent);
    let (mut left, mut came, mut unanswered) = (&sent[..], Vec::new(), 0);
    let mut deadline = Instant::now() + fixture.patience();
    while came.len() < sent.len() || unanswered > 0 {
        while unanswered < WINDOW && !left.is_empty() {
            // Short ones as often as long ones.
            let most = if random.bool() { 16 } else { longest };
            let (piece, rest) = left.split_at(random.usize(1..=most.min(left.len())));
            client.ask(&write(port, piece))?;
            (left, unanswered) = (rest, unanswered + 1);
        }
        for answer in client.answers()? {
            answer.result?;
            unanswered -= 1;
        }
        if read(&client, &mut came)? {
            deadline = Instant::now() + fixture.patience();
        }
        ensure!(Instant::now() < deadline, "{} bytes of {total} came, {unanswered} unanswered", came.len());
        ensure!(came.len() <= sent.len(), "{} bytes came of {total}", came.len());
    }
    is_same(&came, &sent).with_context(|| format!("port {port}, seed {seed}"))
}

fn ports(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let streams = fixture.streams()?;
    ensure!(streams.max_write_bytes > 0 && streams.ports.len() >= fixture.wish.ports, "{streams:?}");
    for (place, port) in streams.ports.iter().enumerate() {
        ensure!(usize::from(port.set) < fixture.binding.lanes(), "{port:?}");
        let mut before = streams.ports[..place].iter();
        ensure!(before.all(|other| other.index != port.index && other.set != port.set), "{streams:?}");
    }
    fixture.until("port 0 is a console", || fixture.port(0).is_ok_and(|port| port.console))
}

fn paste(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    exchange(fixture, fixture.ports[0], 0x9a57e, PASTE_BYTES)
}

fn two_ports_apart(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let fixture: &Fixture<'_> = fixture;
    std::thread::scope(|scope| {
        let side = move |port: u32| exchange(fixture, port, port.into(), PASTE_BYTES);
        let other = scope.spawn(move || side(fixture.ports[1]));
        side(fixture.ports[0])?;
        other.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    })
}

fn impossible_writes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(fixture.lane()?)?;
    let (port, longest) = (fixture.ports[0], fixture.streams()?.max_write_bytes);
    let cases = [
        ("no bytes", Ask::new(IoOp::Send, port.into(), 0)),
        ("too many bytes", Ask::new(IoOp::Send, port.into(), longest + 1)),
        ("a port that is not there", write(77, b"x")),
        ("no port at all", Ask::new(IoOp::Send, u64::MAX, 1)),
        ("a modifier", write(port, b"x").flags(1)),
    ];
    for (what, ask) in cases {
        let answer = client.whole(&ask)?;
        ensure!(answer.as_ref().err() == Some(&IoError::Invalid), "{what}: answered {answer:?}");
    }
    client.whole(&write(port, b"whole"))??;
    comes_back(fixture, &client, b"whole")
}

fn nobody_reads(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    const PIECE_BYTES: usize = 16 << 10;
    const PIECES: usize = 160;
    let lane = fixture.lane()?;
    let mut client = fixture.client(lane)?;
    let mut sent = vec![0; PIECES * PIECE_BYTES];
    fastrand::Rng::with_seed(3).fill(&mut sent);
    for piece in sent.chunks(PIECE_BYTES) {
        client.ask(&write(fixture.ports[0], piece))?;
    }
    // The other side takes what it has room for.
    let (mut answered, mut quiet) = (0, 0);
    while quiet < 20 * fixture.slowness {
        let answers = client.answers()?;
        quiet = if answers.is_empty() { quiet + 1 } else { 0 };
        answered += answers.len();
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(answered < PIECES, "all {PIECES} writes are answered, and nobody has read a byte");
    let receiver = fixture.receiver(lane)?;
    let (mut came, mut deadline) = (Vec::new(), Instant::now() + fixture.patience());
    while came.len() < sent.len() || answered < PIECES {
        if read(&receiver, &mut came)? {
            deadline = Instant::now() + fixture.patience();
        }
        for answer in client.answers()? {
            answer.result?;
            answered += 1;
        }
        ensure!(Instant::now() < deadline, "{} bytes of {} came, {answered} answers", came.len(), sent.len());
    }
    is_same(&came, &sent)
}

fn closed_here(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(fixture.lane()?)?;
    let port = fixture.ports[0];
    for round in 0..3 {
        fixture.binding.set_open(port, false)?;
        fixture.binding.set_open(port, true)?;
        let text = format!("round {round}");
        client.whole(&write(port, text.as_bytes()))??;
        comes_back(fixture, &client, text.as_bytes())?;
    }
    Ok(())
}

fn closed_there(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let client = fixture.receiver(fixture.lane()?)?;
    let told = client.handle().notify().count();
    for open in [false, true] {
        fixture.pull(Lever::Open(open));
        fixture.until("the other side", || fixture.port(0).is_ok_and(|port| port.open == open))?;
    }
    ensure!(client.handle().notify().count() > told, "who has a handle was not told");
    Ok(())
}

fn size(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    for size in [(132, 43), (1, 1), (400, 300)] {
        fixture.pull(Lever::Size(size.0, size.1));
        fixture.until("the size", || fixture.port(0).is_ok_and(|port| port.size == Some(size)))?;
    }
    Ok(())
}

fn comes_and_goes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    for _ in 0..3 {
        fixture.pull(Lever::Plug(true));
        fixture.until("the new port", || fixture.port(1).is_ok_and(|port| port.open))?;
        fixture.binding.set_open(1, true)?;
        exchange(fixture, 1, 1, 10_000)?;
        let mut client = fixture.client(usize::from(fixture.port(1)?.set))?;
        fixture.pull(Lever::Plug(false));
        fixture.until("it is gone", || fixture.port(1).is_err())?;
        let late = client.whole(&write(1, b"late"))?;
        ensure!(late.as_ref().err() == Some(&IoError::Invalid), "answered {late:?}");
        // Port 0 goes on.
        exchange(fixture, 0, 2, 10_000)?;
    }
    Ok(())
}
