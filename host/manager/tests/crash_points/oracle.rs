//! What a disk may hold, by what its clients were told.
//!
//! Time is a count of what the one client does: a request is sent at one time and acknowledged at a later one, or never. Of a sector may be read, or found after a power cut, what some
//! write gave it, but nothing that another write has replaced for certain: one that was sent when the first was acknowledged already, and that was acknowledged itself before the read
//! was sent; for a power cut, acknowledged before a flush was sent that was acknowledged. Writes under way at the same time may be there in either order, or not at all.

use std::collections::HashMap;

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;

/// What a sector's content is made of, again and again: value and sector.
const PIECE: usize = 16;

/// A time that never came.
const NEVER: u64 = u64::MAX;

struct Write {
    /// What it writes; 0 are zeroes.
    value: u64,
    sent: u64,
    acknowledged: u64,
}

enum Asked {
    Write(usize),
    Read { first: u64, sectors: u64, sent: u64 },
    Flush { sent: u64 },
}

/// What was sent and acknowledged so far.
pub(crate) struct Oracle {
    now: u64,
    /// In the order in which they were sent. The first one is of the whole disk, before time began.
    writes: Vec<Write>,
    /// By sector, those of its writes that may still matter.
    of_sector: Vec<Vec<usize>>,
    under_way: HashMap<u64, Asked>,
    /// When the last flush was sent that was acknowledged.
    flushed: u64,
}

impl Oracle {
    /// A disk of zeroes.
    pub(crate) fn new(sectors: u64) -> Oracle {
        let zeroes = Write { value: 0, sent: 0, acknowledged: 0 };
        let of_sector = vec![vec![0]; sectors as usize];
        Oracle { now: 1, writes: vec![zeroes], of_sector, under_way: HashMap::new(), flushed: 0 }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A write is about to be sent as `user`; what it has to write, sector by sector.
    pub(crate) fn write(&mut self, user: u64, first: u64, sectors: u64) -> Vec<u8> {
        let value = self.writes.len() as u64;
        self.send_write(user, first, sectors, value);
        (first..first + sectors).flat_map(|sector| content(value, sector)).collect()
    }

    /// The same of zeroes.
    pub(crate) fn write_zeroes(&mut self, user: u64, first: u64, sectors: u64) {
        self.send_write(user, first, sectors, 0);
    }

    fn send_write(&mut self, user: u64, first: u64, sectors: u64, value: u64) {
        let sent = self.tick();
        let index = self.writes.len();
        self.writes.push(Write { value, sent, acknowledged: NEVER });
        for sector in first..first + sectors {
            let mut of = std::mem::take(&mut self.of_sector[sector as usize]);
            // What is replaced for good can be forgotten.
            of.retain(|write| !self.is_replaced(sector, *write, self.flushed));
            of.push(index);
            self.of_sector[sector as usize] = of;
        }
        self.under_way.insert(user, Asked::Write(index));
    }

    /// A read is about to be sent.
    pub(crate) fn read(&mut self, user: u64, first: u64, sectors: u64) {
        let sent = self.tick();
        self.under_way.insert(user, Asked::Read { first, sectors, sent });
    }

    /// A flush is about to be sent.
    pub(crate) fn flush(&mut self, user: u64) {
        let sent = self.tick();
        self.under_way.insert(user, Asked::Flush { sent });
    }

    /// A success was heard of; of a read also what it brought.
    ///
    /// # Errors
    /// What cannot be.
    pub(crate) fn acknowledged(&mut self, user: u64, data: &[u8]) -> Result<(), String> {
        let now = self.tick();
        match self.under_way.remove(&user) {
            None => return Err(format!("request {user} was answered twice, or never sent")),
            Some(Asked::Write(index)) => self.writes[index].acknowledged = now,
            Some(Asked::Flush { sent }) => self.flushed = self.flushed.max(sent),
            Some(Asked::Read { first, sectors, sent }) => {
                if data.len() as u64 != sectors * SECTOR as u64 {
                    return Err(format!("read at {sent}: {} bytes of {sectors} sectors", data.len()));
                }
                for (sector, data) in (first..).zip(data.chunks(SECTOR)) {
                    self.check(sector, data, sent, true).map_err(|why| format!("read at {sent}: {why}"))?;
                }
            }
        }
        Ok(())
    }

    /// The power has been cut: whether the disk's `contents` may be so. What comes later than this is not acknowledged.
    ///
    /// # Errors
    /// What cannot be.
    pub(crate) fn after_a_cut(&self, contents: &[u8]) -> Result<(), String> {
        for (sector, data) in (0..).zip(contents.chunks(SECTOR)) {
            self.check(sector, data, self.flushed, false).map_err(|why| format!("after the power cut: {why}"))?;
        }
        Ok(())
    }

    /// Whether a sector may hold this, to somebody for whom everything counts that was acknowledged before `since`.
    fn check(&self, sector: u64, data: &[u8], since: u64, is_read: bool) -> Result<(), String> {
        let of = &self.of_sector[sector as usize];
        let allowed: Vec<_> = of.iter().filter(|write| !self.is_replaced(sector, **write, since)).collect();
        let content_of = |write: &usize| content(self.writes[*write].value, sector);
        if allowed.iter().any(|write| content_of(write) == data) {
            return Ok(());
        }
        // The sim's queues do not wait for each other: who reads what is being written may find a part of it.
        let may_be_torn = is_read && allowed.iter().any(|write| self.writes[**write].acknowledged >= since);
        if may_be_torn
            && data.chunks(PIECE).all(|piece| allowed.iter().any(|write| content_of(write)[..PIECE] == *piece))
        {
            return Ok(());
        }
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| data[8 * at + byte]));
        let mut why = format!("sector {sector} holds value {} of sector {}", word(0), word(1));
        if data.chunks(PIECE).any(|piece| piece != &data[..PIECE]) {
            why += ", torn";
        }
        why += &format!("; what was acknowledged before {since} counts, and there are");
        for write in of.iter().map(|write| &self.writes[*write]) {
            let acknowledged =
                if write.acknowledged == NEVER { "never".into() } else { write.acknowledged.to_string() };
            why += &format!("\n  value {} sent {} acknowledged {acknowledged}", write.value, write.sent);
        }
        Err(why)
    }

    /// Whether another write of the sector has come after this one for certain.
    fn is_replaced(&self, sector: u64, write: usize, since: u64) -> bool {
        let replaced_by = |later: &usize| {
            let later = &self.writes[*later];
            later.acknowledged < since && self.writes[write].acknowledged < later.sent
        };
        self.of_sector[sector as usize].iter().any(replaced_by)
    }

    /// Writes that were acknowledged and not flushed since.
    pub(crate) fn at_risk(&self) -> usize {
        self.writes.iter().filter(|write| write.acknowledged != NEVER && write.acknowledged >= self.flushed).count()
    }
}

/// A sector of a value: who looks at it sees whether it is torn or somewhere else.
fn content(value: u64, sector: u64) -> [u8; SECTOR] {
    let mut content = [0; SECTOR];
    if value != 0 {
        for piece in content.chunks_mut(PIECE) {
            piece[..8].copy_from_slice(&value.to_le_bytes());
            piece[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
    content
}

#[test]
fn what_was_flushed_must_be_there_and_what_was_not_may() {
    let mut oracle = Oracle::new(2);
    let old = oracle.write(1, 0, 2);
    assert_eq!(oracle.after_a_cut(&[0; 2 * SECTOR]), Ok(()), "never acknowledged");
    assert_eq!(oracle.after_a_cut(&old), Ok(()), "and yet it may be there");
    oracle.acknowledged(1, &[]).unwrap();
    assert_eq!(oracle.after_a_cut(&[0; 2 * SECTOR]), Ok(()), "not flushed");
    oracle.flush(2);
    let new = oracle.write(3, 1, 1);
    oracle.acknowledged(2, &[]).unwrap();
    oracle.acknowledged(3, &[]).unwrap();
    let both = [&old[..SECTOR], &new].concat();
    assert_eq!((oracle.after_a_cut(&old), oracle.after_a_cut(&both)), (Ok(()), Ok(())), "the flush was before it");
    let lost = oracle.after_a_cut(&[&[0; SECTOR], &new[..]].concat()).unwrap_err();
    assert!(lost.contains("sector 0 holds value 0"), "{lost}");
    assert_eq!(oracle.at_risk(), 1);
}

#[test]
fn a_read_sees_what_was_acknowledged_before_it_was_sent_or_something_newer() {
    let mut oracle = Oracle::new(1);
    let first = oracle.write(1, 0, 1);
    oracle.acknowledged(1, &[]).unwrap();
    let second = oracle.write(2, 0, 1);
    for (user, data) in [(10, &first), (11, &second)] {
        oracle.read(user, 0, 1);
        assert_eq!(oracle.acknowledged(user, data), Ok(()), "the second is under way");
    }
    oracle.read(20, 0, 1);
    let torn = [&first[..256], &second[256..]].concat();
    assert_eq!(oracle.acknowledged(20, &torn), Ok(()), "a part of what is under way");
    oracle.read(12, 0, 1);
    assert!(oracle.acknowledged(12, &[0; SECTOR]).is_err(), "older than what was acknowledged");
    oracle.read(13, 0, 1);
    oracle.acknowledged(2, &[]).unwrap();
    assert_eq!(oracle.acknowledged(13, &first), Ok(()), "it was not acknowledged when the read was sent");
    for (user, data) in [(14, &first), (15, &torn)] {
        oracle.read(user, 0, 1);
        assert!(oracle.acknowledged(user, data).is_err());
    }
    assert!(oracle.acknowledged(14, &second).is_err(), "answered twice");
}

#[test]
fn what_was_never_sent_is_nothing_that_a_sector_may_hold() {
    let mut oracle = Oracle::new(2);
    let data = oracle.write(1, 0, 1);
    let elsewhere = [vec![0; SECTOR], data.clone()].concat();
    assert!(oracle.after_a_cut(&elsewhere).is_err(), "another sector's");
    let torn = [&data[..256], &[0; 256 + SECTOR]].concat();
    assert!(oracle.after_a_cut(&torn).unwrap_err().contains("torn"));
}

#[test]
fn writes_under_way_together_may_be_there_in_either_order() {
    let mut oracle = Oracle::new(1);
    let (first, second) = (oracle.write(1, 0, 1), oracle.write(2, 0, 1));
    oracle.acknowledged(2, &[]).unwrap();
    oracle.acknowledged(1, &[]).unwrap();
    oracle.flush(3);
    oracle.acknowledged(3, &[]).unwrap();
    assert_eq!((oracle.after_a_cut(&first), oracle.after_a_cut(&second)), (Ok(()), Ok(())));
    assert!(oracle.after_a_cut(&[0; SECTOR]).is_err());
    oracle.write_zeroes(4, 0, 1);
    assert_eq!(oracle.after_a_cut(&[0; SECTOR]), Ok(()));
}
