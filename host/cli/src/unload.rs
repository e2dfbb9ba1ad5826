//! `cofferdam unload`: the command that waits, and can be called off.

use std::convert::Infallible;
use std::time::Duration;

use cofferdam_manager::{Certificate, Explanation};
use hyper::Method;

use crate::args::UnloadArgs;
use crate::client::{ANSWER, millis, progress, url};
use crate::control::{ErrorBody, ErrorCode, UnloadBody};
use crate::link::Link;
use crate::{log, show, signals};

/// After this much waiting `--explain` says what is waited for.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// How often it looks whether that is still the same.
const LOOK: Duration = Duration::from_secs(2);
/// How long a client that was interrupted looks for what it leaves behind.
const LAST_LOOK: Duration = Duration::from_secs(1);

pub(crate) fn unload(args: UnloadArgs) -> Result<(), ErrorBody> {
    let runtime = signals::runtime()?;
    let result = runtime.block_on(async {
        let mut stop = signals::StopSignals::catch()?;
        tokio::select! {
            result = ask(&args) => result,
            () = stop.next() => tokio::select! {
                result = left_behind(&args) => result,
                () = stop.next() => Err(interrupted(&args.name, "is perhaps")),
            },
        }
    });
    let certificate = result?;
    if args.json {
        show::json(&certificate)
    } else {
        show::certificate(&certificate)
    }
    Ok(())
}

/// The unload itself. Dropping it calls it off.
async fn ask(args: &UnloadArgs) -> Result<Certificate, ErrorBody> {
    let link = Link::new(args.socket.socket.as_deref());
    let url = url(&args.name, "/unload")?;
    let body = UnloadBody { deadline_ms: millis(args.deadline), force: args.force, explain: args.explain };
    tokio::select! {
        result = link.call(Method::POST, &url, Some(&body), args.deadline + ANSWER) => result,
        never = meanwhile(args) => match never {},
    }
}

async fn meanwhile(args: &UnloadArgs) -> Infallible {
    if !args.explain {
        progress("draining").await;
    }
    let mut told = Vec::new();
    tokio::time::sleep(FIRST_LOOK).await;
    loop {
        // A look that fails is not what the operator asked for; the unload itself says what is wrong.
        if let Ok(explanation) = look(args).await {
            let now = show::fingerprint(&explanation);
            if now != told && !explanation.waits_for.is_empty() {
                say(&explanation, args.json);
                told = now;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(args: &UnloadArgs) -> Result<Explanation, ErrorBody> {
    let link = Link::new(args.socket.socket.as_deref());
    link.call(Method::GET, &url(&args.name, "/why")?, None::<&()>, LAST_LOOK).await
}

/// On stderr, because stdout is for the certificate: a document a line for a script, sentences for a person.
fn say(explanation: &Explanation, json: bool) {
    match serde_json::to_string(&serde_json::json!({ "waiting": explanation })) {
        Ok(text) if json => log::say(&text),
        _ => {
            let sentences = explanation.waits_for.iter().map(|sentence| show::harmless(sentence));
            let sentences: String = sentences.map(|sentence| format!("\n  {sentence}")).collect();
            log::say(&format!("'{}' waits for{sentences}", explanation.name));
        }
    }
}

/// What an operator is told who has interrupted the wait. It may have been over in that moment: then there is a certificate.
async fn left_behind(args: &UnloadArgs) -> Result<Certificate, ErrorBody> {
    let explanation = look(args).await?;
    match explanation.certificate {
        Some(certificate) => Ok(certificate),
        None if explanation.phase == "serving" => {
            Err(ErrorBody::failed(format!("interrupted before '{}' was asked to leave: it serves", args.name)))
        }
        None => {
            let explanation = args.explain.then(|| Box::new(explanation));
            Err(ErrorBody { explanation, ..interrupted(&args.name, "is still") })
        }
    }
}

fn interrupted(name: &str, is: &str) -> ErrorBody {
    let message = format!(
        "interrupted: '{name}' {is} draining; 'cofferdam unload {name}' goes on, 'cofferdam why {name}' says what it waits for"
    );
    ErrorBody::new(ErrorCode::StillDraining, message)
}
