//! What has to hold of network devices. The other side sends every frame back on the pair of queues that it came by.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{Arrivals, IoError, IoOp};

use crate::bed::{Class, Lever, Wish};
use crate::client::{Ask, bytes};
use crate::{Case, Client, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "the_offer_is_the_devices", wish: Wish::of, check: offer },
    Case { name: "frames_of_all_lengths_come_back_whole_and_in_order", wish: Wish::of, check: all_lengths },
    Case { name: "frames_come_back_over_a_plain_ring", wish: Wish::plain_ring, check: all_lengths },
    Case { name: "frames_come_back_over_a_small_ring", wish: Wish::small_ring, check: all_lengths },
    Case { name: "frames_come_back_in_one_buffer_each", wish: single_buffers, check: all_lengths },
    Case { name: "jumbo_frames_come_back", wish: jumbo, check: all_lengths },
    Case { name: "frames_that_cannot_be_are_refused_and_harm_nothing", wish: Wish::of, check: impossible_frames },
    Case { name: "what_was_not_negotiated_is_refused", wish: no_offloads, check: not_negotiated },
    Case { name: "a_checksum_is_left_to_the_other_side", wish: offloads, check: open_checksum },
    Case { name: "segmentation_is_left_to_the_other_side", wish: offloads, check: one_large_segment },
    Case { name: "two_lanes_get_their_own_frames", wish: Wish::two_queues, check: two_lanes },
    Case { name: "what_nobody_receives_holds_up_nobody_who_sends", wish: Wish::of, check: nobody_receives },
    Case { name: "who_keeps_what_arrives_gets_no_more_until_it_lets_go", wish: Wish::of, check: kept_frames },
    Case { name: "the_state_of_the_link_is_in_the_offer", wish: Wish::with_levers, check: link },
];

/// Bytes of a link header (IEEE 802.3).
const HEADER_BYTES: usize = 14;
/// A kind of frame that is for experiments (IEEE 802).
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];
/// Shortest frame (IEEE 802.3, without its check sequence); what is less, a network may fill up.
const SHORTEST_BYTES: usize = 60;
/// Frames on their way at a time.
const WINDOW: usize = 32;
/// A packet of TCP over IPv4: where its checksum starts, where from there it goes, and bytes of all headers.
const TCP: (u64, u64, u64) = (34, 16, 54);
/// Flags of a packet (`wit/net.wit`).
const NEEDS_CHECKSUM: u8 = 1;
const SEGMENTS_TCP4: u8 = 0x10;

fn single_buffers(class: Class) -> Wish {
    Wish { single_buffers: true, ..Wish::of(class) }
}

fn jumbo(class: Class) -> Wish {
    Wish { mtu: 9000, ..Wish::of(class) }
}

fn offloads(class: Class) -> Wish {
    Wish { offloads: Some(true), ..Wish::of(class) }
}

fn no_offloads(class: Class) -> Wish {
    Wish { offloads: Some(false), ..Wish::of(class) }
}

/// A frame to everyone with a number in it, and bytes that only that number has.
pub(crate) fn numbered(number: u64, length: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x02, 0xcf, 0xda, 0, 0, 3]);
    frame.extend(EXPERIMENTAL);
    frame.extend(number.to_le_bytes());
    let mut random = fastrand::Rng::with_seed(number);
    frame.extend(std::iter::repeat_with(|| random.u8(..)).take(length.saturating_sub(frame.len())));
    frame
}

/// The number of a frame of ours; others there may be, the kernel's end says something now and then.
pub(crate) fn number(frame: &[u8]) -> Option<u64> {
    let is_ours = frame.get(HEADER_BYTES - 2..HEADER_BYTES) == Some(&EXPERIMENTAL[..]);
    is_ours.then(|| frame.get(HEADER_BYTES..HEADER_BYTES + 8)?.try_into().ok().map(u64::from_le_bytes)).flatten()
}

fn transmit(frame: &[u8]) -> Ask {
    Ask::payload(IoOp::Transmit, 0, frame)
}

/// Sends frames of these lengths, a window of them at a time, and wants each back as it was, in their order. Numbers count from `first`.
fn exchange(fixture: &Fixture<'_>, client: &mut Client, first: u64, lengths: &[usize]) -> anyhow::Result<()> {
    let mut lengths = lengths.iter();
    let (mut next, mut expected, mut unanswered, mut arrivals) = (first, VecDeque::new(), 0_usize, Arrivals::new());
    let mut deadline = Instant::now() + fixture.patience();
    loop {
        while expected.len() < WINDOW
            && let Some(length) = lengths.next()
        {
            let frame = numbered(next, *length);
            client.ask(&transmit(&frame))?;
            expected.push_back(frame);
            (next, unanswered) = (next + 1, unanswered + 1);
        }
        for answer in client.answers()? {
            answer.result?;
            unanswered -= 1;
        }
        if expected.is_empty() && unanswered == 0 {
            return Ok(());
        }
        if client.receive(Duration::from_millis(5), &mut arrivals) > 0 {
            deadline = Instant::now() + fixture.patience();
        }
        ensure!(Instant::now() < deadline, "{} frames do not come back, {unanswered} answers", expected.len());
        for arrival in arrivals.iter() {
            let came = bytes(arrival)?;
            ensure!(came.len() == arrival.len(), "{} bytes of {}", came.len(), arrival.len());
            let Some(number) = number(&came) else { continue };
            let sent = expected.pop_front().with_context(|| format!("{number} came twice"))?;
            ensure!(came == sent, "{number}: {} bytes came for {} of {next}", came.len(), sent.len());
        }
        arrivals.clear();
    }
}

fn offer(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let net = fixture.net()?;
    ensure!(net.mtu == fixture.wish.mtu, "{net:?}");
    ensure!(net.mac.is_some_and(|mac| mac[0] & 1 == 0 && mac != [0; 6]), "{net:?}");
    ensure!(net.link_up && net.pairs == fixture.wish.queues, "{net:?}");
    ensure!(net.max_packet_bytes as usize >= usize::from(net.mtu) + HEADER_BYTES, "{net:?}");
    ensure!(fixture.binding.lanes() == usize::from(net.pairs), "{} lanes, {net:?}", fixture.binding.lanes());
    Ok(())
}

fn all_lengths(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    const SEED: u64 = 0x5eed;
    let mut client = fixture.receiver(0)?;
    let longest = usize::from(fixture.wish.mtu) + HEADER_BYTES;
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut lengths: Vec<_> = (0..600).map(|_| random.usize(SHORTEST_BYTES..=longest)).collect();
    lengths.extend([longest, SHORTEST_BYTES, longest, longest]);
    exchange(fixture, &mut client, 0, &lengths).with_context(|| format!("seed {SEED:#x}"))
}

fn impossible_frames(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(0)?;
    let net = fixture.net()?;
    let longest = u32::from(net.mtu) + HEADER_BYTES as u32;
    let ordinary = numbered(0, 64);
    let ask = |length: u32| Ask::new(IoOp::Transmit, 0, length).with(&ordinary[..ordinary.len().min(length as usize)]);
    let cases = [
        ("no bytes", ask(0)),
        ("less than a link header", ask(13)),
        ("longer than the network takes", ask(longest + 5)),
        ("longer than anything", ask(net.max_packet_bytes + 1)),
        ("a flag that there is none of", transmit(&ordinary).flags(2)),
        ("segments of another protocol", transmit(&ordinary).flags(0x71)),
        ("a checksum that nobody asked for", Ask { offset: 34, ..transmit(&ordinary) }),
        ("a checksum behind the end", Ask { offset: 60 | 16 << 16, ..transmit(&ordinary).flags(NEEDS_CHECKSUM) }),
        ("segments of no bytes", Ask { offset: 34 | 16 << 16, ..transmit(&ordinary).flags(0x11) }),
    ];
    for (what, ask) in cases {
        let answer = client.whole(&ask)?;
        ensure!(answer.as_ref().err() == Some(&IoError::Invalid), "{what}: answered {answer:?}");
    }
    // None of them reached the other side: what comes back first is this.
    exchange(fixture, &mut client, 100, &[64; 10])
}

/// A packet of TCP that leaves its checksum, and with a size of segments its segmentation, to the device.
fn unfinished(length: usize, segment_bytes: u64) -> Ask {
    let (start, goes, headers) = TCP;
    let flags = if segment_bytes > 0 { NEEDS_CHECKSUM | SEGMENTS_TCP4 } else { NEEDS_CHECKSUM };
    let headers = if segment_bytes > 0 { headers } else { 0 };
    let offset = start | goes << 16 | segment_bytes << 32 | headers << 48;
    Ask { offset, ..transmit(&numbered(7, length)).flags(flags) }
}

fn not_negotiated(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(0)?;
    let net = fixture.net()?;
    ensure!(net.offloads == Default::default(), "{net:?}");
    for ask in [unfinished(200, 0), unfinished(1000, 500)] {
        let answer = client.whole(&ask)?;
        ensure!(answer.as_ref().err() == Some(&IoError::Invalid), "flags {}: answered {answer:?}", ask.flags);
    }
    exchange(fixture, &mut client, 0, &[64; 10])
}

/// Sends it and wants it back with the same still to be done.
fn comes_back_unfinished(fixture: &Fixture<'_>, ask: &Ask) -> anyhow::Result<()> {
    let mut client = fixture.receiver(0)?;
    client.whole(ask)??;
    let mut arrivals = Arrivals::new();
    fixture.until("the packet", || client.receive(Duration::from_millis(5), &mut arrivals) > 0)?;
    let arrival = arrivals.first().context("nothing arrived")?;
    let (flags, argument) = (arrival.flags(), arrival.argument());
    ensure!(arrivals.len() == 1 && bytes(arrival)? == ask.data, "{} bytes", arrival.len());
    ensure!((flags, argument) == (ask.flags, ask.offset), "flags {flags:#x}, {argument:#x} and not {ask:?}");
    Ok(())
}

fn open_checksum(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let offloads = fixture.net()?.offloads;
    ensure!(offloads.transmit_checksum && offloads.receive_checksum, "{offloads:?}");
    comes_back_unfinished(fixture, &unfinished(200, 0))
}

fn one_large_segment(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let offloads = fixture.net()?.offloads;
    ensure!(offloads.transmit_tcp4 && offloads.receive_tcp4, "{offloads:?}");
    comes_back_unfinished(fixture, &unfinished(40_000, 1448))
}

fn two_lanes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lanes = fixture.binding.lanes();
    ensure!(lanes == 2 && fixture.net()?.pairs == 2, "{lanes} lanes, {:?}", fixture.net()?);
    let fixture: &Fixture<'_> = fixture;
    std::thread::scope(|scope| {
        // A frame of the other lane's has another number, and is an error here.
        let side = move |lane: usize| {
            let mut client = fixture.receiver(lane)?;
            exchange(fixture, &mut client, lane as u64 * 1_000_000, &[200; 500]).with_context(|| format!("lane {lane}"))
        };
        let other = scope.spawn(move || side(1));
        side(0)?;
        other.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    })
}

/// Sends frames with these numbers without looking for what comes back.
fn send(client: &mut Client, numbers: std::ops::Range<u64>) -> anyhow::Result<()> {
    for number in numbers {
        client.whole(&transmit(&numbered(number, 64)))??;
    }
    Ok(())
}

fn nobody_receives(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    send(&mut fixture.client(0)?, 0..1000)?;
    let client = fixture.receiver(0)?;
    let (mut arrivals, mut came) = (Arrivals::new(), Vec::new());
    let enough = || {
        client.receive(Duration::from_millis(5), &mut arrivals);
        came.extend(arrivals.iter().filter_map(|arrival| number(&bytes(arrival).ok()?)));
        arrivals.clear();
        came.len() >= 64
    };
    fixture.until("what there was room for", enough)?;
    ensure!(came.iter().copied().take(64).eq(0..64), "the first that came is not the first that was sent: {came:?}");
    ensure!(came.is_sorted_by(|one, next| one < next), "out of order: {came:?}");
    Ok(())
}

/// A client that takes packets and keeps them takes as many as buffers are posted.
fn kept_frames(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    /// Entries of the ring, which is how many buffers are posted at the most.
    const POSTED: usize = 256;
    let mut client = fixture.receiver(0)?;
    let (mut kept, mut sent) = (Arrivals::new(), 0);
    // As long as more comes, and until so much was sent that it could have been too much.
    let mut quiet = 0;
    while quiet < 20 || sent < 3 * POSTED as u64 {
        send(&mut client, sent..sent + 16)?;
        sent += 16;
        let came = client.receive(Duration::from_millis(2), &mut kept);
        quiet = if came == 0 { quiet + 1 } else { 0 };
        ensure!(kept.len() <= POSTED, "{} packets came into {POSTED} buffers", kept.len());
    }
    ensure!(kept.len() >= POSTED / 4, "{} packets came", kept.len());
    let numbers = |arrivals: &Arrivals| -> Vec<u64> {
        arrivals.iter().filter_map(|arrival| number(&bytes(arrival).ok()?)).collect()
    };
    let last = numbers(&kept).last().copied().context("none of the frames came")?;
    // What it lets go of is the device's again.
    kept.clear();
    client.handle().give_back();
    send(&mut client, sent..sent + 16)?;
    fixture.until("more", || client.receive(Duration::from_millis(5), &mut kept) > 0 && !numbers(&kept).is_empty())?;
    ensure!(numbers(&kept)[0] > last, "{} came after {last}", numbers(&kept)[0]);
    Ok(())
}

fn link(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(0)?;
    let told = client.handle().notify().count();
    for up in [false, true] {
        fixture.pull(Lever::Link(up));
        fixture.until("the link", || fixture.net().is_ok_and(|net| net.link_up == up))?;
    }
    ensure!(client.handle().notify().count() > told, "who has a handle was not told");
    exchange(fixture, &mut client, 0, &[64; 10])
}
