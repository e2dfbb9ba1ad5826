//! `GET /v1/events`: the manager's events as lines of JSON.
//!
//! What is kept is answered piece by piece as the client takes it, without a thread. A follower has a thread, because an [`EventReader`] waits by blocking; a bounded
//! channel joins it to the connection, so that a client that stops reading costs [`QUEUED`] pieces of memory and is told by the reader how much it has missed.
//! When the connection ends, its end of the channel goes, and the thread with it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::response::Response;
use cofferdam_manager::{EventReader, EventRecord};
use hyper::body::{Bytes, Frame};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::control::ErrorBody;

/// Followers at a time.
const FOLLOWERS: usize = 16;
/// Clients at a time that are told what is kept.
const READERS: usize = 8;
/// Pieces that wait for a slow follower.
const QUEUED: usize = 4;
/// A piece is sent when it has this many bytes, or when there is nothing more to put in it.
const PIECE_BYTES: usize = 8 << 10;
/// How often a follower's thread looks whether its client or the daemon has gone.
const LOOK: Duration = Duration::from_millis(100);
/// Records in one answer to a client that does not follow: more than are ever kept, so that it ends while more happens.
const ANSWER_RECORDS: usize = 8192;

/// Everyone who follows, or is being told what is kept.
pub(crate) struct Followers {
    slots: Arc<Semaphore>,
    readers: Arc<Semaphore>,
    stopping: AtomicBool,
}

impl Followers {
    pub(crate) fn new() -> Arc<Followers> {
        let (slots, readers) = (Arc::new(Semaphore::new(FOLLOWERS)), Arc::new(Semaphore::new(READERS)));
        Arc::new(Followers { slots, readers, stopping: AtomicBool::new(false) })
    }

    /// The answer that brings `reader`'s records until the client goes or the daemon stops.
    pub(crate) fn follow(self: &Arc<Self>, reader: EventReader) -> Result<Response, ErrorBody> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| {
            ErrorBody::failed(format!("{FOLLOWERS} clients follow the events already; more are not served"))
        })?;
        // Given back when both the thread and the connection are done with it: not when the last piece is taken, but when it is written.
        let slot = Arc::new(slot);
        let (pieces, rest) = mpsc::channel(QUEUED);
        let (followers, kept) = (Arc::clone(self), Arc::clone(&slot));
        let thread = std::thread::Builder::new().name("cofferdam-events".into());
        let run = move || {
            let _slot = kept;
            followers.feed(reader, &pieces);
        };
        thread.spawn(run).map_err(|error| ErrorBody::failed(format!("no thread to follow the events on: {error}")))?;
        let mut response = Response::new(Body::new(Following { pieces: rest }));
        response.extensions_mut().insert(HeldByConnection(slot));
        Ok(response)
    }

    /// The answer that brings what is kept from `reader`'s place on.
    pub(crate) fn kept(&self, reader: EventReader) -> Result<Response, ErrorBody> {
        let slot = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| {
            ErrorBody::failed(format!(
                "{READERS} clients are being told the events already; try again when one has ended"
            ))
        })?;
        Ok(Response::new(Body::new(Kept { reader, left: ANSWER_RECORDS, _slot: slot })))
    }

    fn feed(&self, mut reader: EventReader, pieces: &mpsc::Sender<Bytes>) {
        while !pieces.is_closed() {
            // Read before the look for records: what was recorded before the stop is still sent.
            let stopping = self.stopping.load(Ordering::Acquire);
            let piece = piece(&mut reader, LOOK, usize::MAX).0;
            if piece.is_empty() {
                if stopping {
                    return;
                }
                continue;
            }
            if pieces.blocking_send(piece).is_err() {
                return;
            }
        }
    }

    /// Lets every follower take what there is and end; waits for them for at most `bound`.
    pub(crate) fn finish(&self, bound: Duration) {
        self.stopping.store(true, Ordering::Release);
        let deadline = Instant::now() + bound;
        while self.slots.available_permits() < FOLLOWERS && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Lines of the next records, and how many: waits for the first for at most `wait`.
fn piece(reader: &mut EventReader, wait: Duration, most: usize) -> (Bytes, usize) {
    let (mut bytes, mut records) = (Vec::new(), 0);
    while records < most && bytes.len() < PIECE_BYTES {
        let Some(record) = reader.next(if records == 0 { wait } else { Duration::ZERO }) else { break };
        write_line(&record, &mut bytes);
        records += 1;
    }
    (bytes.into(), records)
}

fn write_line(record: &EventRecord, out: &mut Vec<u8>) {
    if let Err(error) = serde_json::to_writer(&mut *out, record) {
        tracing::error!(%error, seq = record.seq, "an event is not representable as JSON");
    }
    out.push(b'\n');
}

/// What a connection keeps until it ends ([`crate::serve`]), as an extension of its answer.
#[derive(Clone)]
pub(crate) struct HeldByConnection(#[allow(dead_code, reason = "held, never looked at")] Arc<OwnedSemaphorePermit>);

struct Following {
    pieces: mpsc::Receiver<Bytes>,
}

impl HttpBody for Following {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.pieces.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

struct Kept {
    reader: EventReader,
    left: usize,
    _slot: OwnedSemaphorePermit,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = self.left;
        let (piece, records) = piece(&mut self.reader, Duration::ZERO, left);
        self.left -= records;
        Poll::Ready((records > 0).then(|| Ok(Frame::data(piece))))
    }
}
