//! `cofferdam events`: what happened, and what happens.

use std::io::Write;
use std::time::Duration;

use cofferdam_manager::EventRecord;

use crate::args::EventsArgs;
use crate::client::{ANSWER, PROGRESS};
use crate::control::ErrorBody;
use crate::link::{End, Lines, Link};
use crate::{log, show, signals};

/// How long the streaming may take to end after Ctrl-C when nobody reads what it writes.
const LAST_WORDS: Duration = Duration::from_millis(100);

pub(crate) fn events(args: EventsArgs) -> Result<(), ErrorBody> {
    let runtime = signals::runtime()?;
    let result = runtime.block_on(async {
        let mut stop = signals::StopSignals::catch()?;
        // A task of its own: a stdout that nobody reads holds it up, and not the signals.
        let mut streaming = tokio::spawn(stream(args));
        tokio::select! {
            result = &mut streaming => result.unwrap_or_else(|error| Err(ErrorBody::failed(error))),
            () = stop.next() => Ok(()),
        }
    });
    runtime.shutdown_timeout(LAST_WORDS);
    result
}

async fn stream(args: EventsArgs) -> Result<(), ErrorBody> {
    let link = Link::new(args.socket.socket.as_deref());
    let since = args.since.map_or_else(String::new, |since| format!("since={since}&"));
    let mut lines = link.lines(&format!("/v1/events?{since}follow={}", args.follow), ANSWER).await?;
    loop {
        let end = match next(&mut lines, args.follow).await? {
            Ok(some) => {
                let text = if args.json { some } else { as_text(&some)? };
                let written = tokio::task::block_in_place(|| {
                    let mut stdout = std::io::stdout().lock();
                    stdout.write_all(&text).and_then(|()| stdout.flush())
                });
                // Whoever read this has gone: there is nobody to tell.
                if written.is_err() {
                    return Ok(());
                }
                continue;
            }
            Err(end) => end,
        };
        return match end {
            End::Said if !args.follow => Ok(()),
            End::Broke if !args.follow => Err(ErrorBody::failed("the daemon went away in the middle of its answer")),
            End::Said => ended("the daemon has stopped"),
            End::Broke => ended("the daemon went away"),
        };
    }
}

/// A follower waits for ever, and says nothing about it; anyone else is told what takes so long, and waits within a bound.
async fn next(lines: &mut Lines, follow: bool) -> Result<Result<Vec<u8>, End>, ErrorBody> {
    if follow {
        return lines.next().await;
    }
    let next = lines.next();
    tokio::pin!(next);
    for _ in 0..ANSWER.as_secs() / PROGRESS.as_secs() {
        tokio::select! {
            result = &mut next => return result,
            () = tokio::time::sleep(PROGRESS) => tracing::warn!("asking the daemon..."),
        }
    }
    Err(ErrorBody::failed("the daemon stopped in the middle of its answer"))
}

fn ended(why: &str) -> Result<(), ErrorBody> {
    log::say(&format!("cofferdam: {why}"));
    Ok(())
}

fn as_text(lines: &[u8]) -> Result<Vec<u8>, ErrorBody> {
    let mut text = String::new();
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let record: EventRecord = serde_json::from_slice(line)
            .map_err(|error| ErrorBody::failed(format!("the daemon sent something else than an event: {error}")))?;
        text.push_str(&show::event(&record));
        text.push('\n');
    }
    Ok(text.into_bytes())
}
