//! The control API's calls: from a request to the manager and back. The documents are in [`crate::control`].

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use cofferdam_manager::{Cancel, Cause, Certificate, Explanation, Manager, UnloadOptions};
use tokio::sync::Semaphore;

use crate::control::{
    ErrorBody, ErrorCode, LONGEST_REVOKE, LONGEST_UNLOAD, LoadBody, PortBody, RevokeBody, RollbackBody, UnloadBody,
    UpgradeBody,
};
use crate::follow::Followers;
use crate::host;
use crate::takeover::Turns;

/// Calls that may block at the same time. Together with those who are told the events they are fewer than the connections that the daemon serves, so that an
/// operator always finds one to look with.
const WAITING_CALLS: usize = 32;
/// How much later than its deadline a call with one is answered at the latest, but for the time of an explanation.
const LATE: Duration = Duration::from_millis(200);
/// How long a forced unload may take whatever its deadline: to interrupt, quiesce and unmap takes time of its own.
const FORCED: Duration = Duration::from_secs(10);
/// How long an explanation may take.
const EXPLANATION: Duration = Duration::from_secs(1);

/// What the calls work on.
#[derive(Clone)]
struct Api {
    manager: Manager,
    followers: Arc<Followers>,
    waiting: Arc<Semaphore>,
    turns: Arc<Turns>,
}

type Body<T> = Result<Json<T>, JsonRejection>;

/// All calls.
pub(crate) fn router(manager: Manager, followers: Arc<Followers>, turns: Arc<Turns>) -> Router {
    Router::new()
        .route("/v1/bindings", get(list).post(load))
        .route("/v1/bindings/{name}", get(one))
        .route("/v1/bindings/{name}/unload", post(unload))
        .route("/v1/bindings/{name}/upgrade", post(upgrade))
        .route("/v1/bindings/{name}/rollback", post(roll_back))
        .route("/v1/bindings/{name}/restart", post(restart))
        .route("/v1/bindings/{name}/crashes", get(crashes))
        .route("/v1/bindings/{name}/why", get(why))
        .route("/v1/bindings/{name}/handles", get(handles))
        .route("/v1/bindings/{name}/handles/{handle}/revoke", post(revoke))
        .route("/v1/bindings/{name}/ports/attach", post(attach_port))
        .route("/v1/bindings/{name}/ports/detach", post(detach_port))
        .route("/v1/events", get(events))
        .fallback(async || answer_error(ErrorBody::no_such_thing("no such call; is the client of another version?")))
        .with_state(Api { manager, followers, waiting: Arc::new(Semaphore::new(WAITING_CALLS)), turns })
}

async fn list(State(api): State<Api>) -> Response {
    Json(api.manager.statuses()).into_response()
}

async fn one(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    answer(host::find(&api.manager, &name).map(|binding| binding.status()))
}

async fn handles(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    answer(host::handles(&api.manager, &name))
}

async fn why(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    let manager = api.manager.clone();
    // It waits for a guest's backtrace, some milliseconds, and has to be had when every slot is taken by a call that is stuck.
    answer(blocking(move || host::why(&manager, &name)).await)
}

async fn crashes(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    answer(host::find(&api.manager, &name).map(|binding| binding.crashes()))
}

async fn upgrade(State(api): State<Api>, UrlPath(name): UrlPath<String>, body: Body<UpgradeBody>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(body, move |body| host::upgrade(&manager, &name, &body)).await)
}

async fn roll_back(State(api): State<Api>, UrlPath(name): UrlPath<String>, body: Body<RollbackBody>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(body, move |body| host::roll_back(&manager, &name, &body)).await)
}

async fn restart(State(api): State<Api>, UrlPath(name): UrlPath<String>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(Ok(Json(())), move |()| host::restart(&manager, &name)).await)
}

async fn load(State(api): State<Api>, body: Body<LoadBody>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(body, move |body| host::load(&manager, &body, None).map(|binding| binding.status())).await)
}

async fn unload(State(api): State<Api>, UrlPath(name): UrlPath<String>, body: Body<UnloadBody>) -> Response {
    let cancel = Cancel::new();
    // The server drops this call when its client's connection ends; the end of this function calls off what is left of it as well.
    let _client = CancelOnDrop(cancel.clone());
    let (forced, explain, deadline) = match &body {
        Ok(body) => (body.force, body.explain, Duration::from_millis(body.deadline_ms).min(LONGEST_UNLOAD)),
        Err(_) => (false, false, Duration::ZERO),
    };
    let options = UnloadOptions {
        deadline,
        force: forced,
        // By force it ends soon, and somebody wants it to: a terminal that closes must not leave it half-way.
        cancel: (!forced).then_some(cancel),
        cause: Cause::Unload,
    };
    let (manager, asked, turns) = (api.manager.clone(), name.clone(), Arc::clone(&api.turns));
    let work = move |_| host::unload(&manager, &asked, &options, explain);
    let call = async {
        match body {
            // Force ends the calls that take the slots.
            Ok(Json(body)) if forced => blocking(move || turns.call().and_then(|_turn| work(body))).await,
            body => api.blocking(body, work).await,
        }
    };
    let patience = if forced { deadline.max(FORCED) } else { deadline };
    answer(match tokio::time::timeout(patience + LATE, call).await {
        Ok(result) => result,
        Err(_) => api.late_unload(name, patience, explain).await,
    })
}

async fn revoke(
    State(api): State<Api>,
    UrlPath((name, handle)): UrlPath<(String, String)>,
    body: Body<RevokeBody>,
) -> Response {
    let deadline = body.as_ref().map_or(0, |body| body.deadline_ms);
    let deadline = Duration::from_millis(deadline).min(LONGEST_REVOKE);
    let (manager, binding, id) = (api.manager.clone(), name.clone(), handle.clone());
    let work = move |_| {
        let id = id.parse().map_err(|_| ErrorBody::usage(format!("'{id}' is not a handle's number")))?;
        host::revoke(&manager, &binding, id, deadline)
    };
    answer(match tokio::time::timeout(deadline + LATE, api.blocking(body, work)).await {
        Ok(result) => result,
        Err(_) => Err(api.late_revoke(name, &handle).await),
    })
}

async fn attach_port(State(api): State<Api>, UrlPath(name): UrlPath<String>, body: Body<PortBody>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(body, move |body| host::attach_port(&manager, &name, &body.port)).await)
}

async fn detach_port(State(api): State<Api>, UrlPath(name): UrlPath<String>, body: Body<PortBody>) -> Response {
    let manager = api.manager.clone();
    answer(api.blocking(body, move |body| host::detach_port(&manager, &name, &body.port)).await)
}

async fn events(State(api): State<Api>, uri: Uri) -> Response {
    let body = parse_events_query(uri.query().unwrap_or("")).and_then(|(since, follow)| {
        let reader = api.manager.events(since);
        if follow { api.followers.follow(reader) } else { api.followers.kept(reader) }
    });
    match body {
        Ok(body) => ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response(),
        Err(error) => answer_error(error),
    }
}

/// `since=SEQ&follow=BOOL`, each at most once, in any order.
fn parse_events_query(query: &str) -> Result<(Option<u64>, bool), ErrorBody> {
    let wrong = |what: &str| ErrorBody::usage(format!("'{what}' is none of since=SEQ, follow=true, follow=false"));
    let (mut since, mut follow) = (None, None);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("since", value)) if since.is_none() => since = Some(value.parse().map_err(|_| wrong(part))?),
            Some(("follow", value)) if follow.is_none() => follow = Some(value.parse().map_err(|_| wrong(part))?),
            _ => return Err(wrong(part)),
        }
    }
    Ok((since, follow.unwrap_or(false)))
}

/// Calls off an unload whose client has gone.
struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Api {
    /// What holds a binding up, of which somebody has waited for long enough.
    async fn explain(&self, name: String) -> Result<Explanation, ErrorBody> {
        let manager = self.manager.clone();
        let explanation = blocking(move || host::why(&manager, &name));
        let late = || Err(ErrorBody::failed("the binding cannot say what it waits for"));
        tokio::time::timeout(EXPLANATION, explanation).await.unwrap_or_else(|_| late())
    }

    /// The answer to an unload that has not come back by its deadline: it may be inside of something that has to end first.
    async fn late_unload(&self, name: String, waited: Duration, explain: bool) -> Result<Certificate, ErrorBody> {
        match self.explain(name.clone()).await {
            Ok(Explanation { certificate: Some(certificate), .. }) => Ok(certificate),
            Ok(explanation) => {
                let waiting_for = explanation.waits_for.join("; ");
                let explanation = explain.then(|| Box::new(explanation));
                Err(host::still_draining(&name, waited, &waiting_for, explanation))
            }
            Err(unknown) => Err(host::still_draining(&name, waited, &unknown.message, None)),
        }
    }

    /// The same for a revocation.
    async fn late_revoke(&self, name: String, handle: &str) -> ErrorBody {
        let message = format!("not everything of handle {handle} of '{name}' has ended (see 'cofferdam why {name}')");
        let explanation = self.explain(name).await.ok().map(Box::new);
        ErrorBody { explanation, ..ErrorBody::new(ErrorCode::StillDraining, message) }
    }

    /// Calls that block (within their bounds) run where that is allowed. A client that goes away does not stop them by itself.
    async fn blocking<B: Send + 'static, T: Send + 'static>(
        &self,
        body: Body<B>,
        work: impl FnOnce(B) -> Result<T, ErrorBody> + Send + 'static,
    ) -> Result<T, ErrorBody> {
        let Json(body) = body.map_err(|error| ErrorBody::usage(error.body_text()))?;
        let slot = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| {
            ErrorBody::failed(format!("{WAITING_CALLS} other calls are being worked on; try again when one has ended"))
        })?;
        let turns = Arc::clone(&self.turns);
        let work = move || {
            let _slot = slot;
            let _turn = turns.call()?;
            work(body)
        };
        blocking(work).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ErrorBody> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ErrorBody::failed(error)))
}

fn answer<T: serde::Serialize>(result: Result<T, ErrorBody>) -> Response {
    match result {
        Ok(document) => Json(document).into_response(),
        Err(error) => answer_error(error),
    }
}

/// The answer that says why not.
pub(crate) fn answer_error(error: ErrorBody) -> Response {
    let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(error)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_events_query_says_since_and_follow_and_nothing_else() {
        let parse = |query: &str| parse_events_query(query).map_err(|error| error.message);
        assert_eq!(parse(""), Ok((None, false)));
        assert_eq!(parse("since=7"), Ok((Some(7), false)));
        assert_eq!(parse("follow=true&since=0"), Ok((Some(0), true)));
        let wrong = ["since=", "since=-1", "since=x", "since=99999999999999999999", "follow=1", "follow", "a=b"];
        for query in wrong.into_iter().chain(["since=1&since=2", "follow=true&follow=true"]) {
            assert!(parse(query).is_err(), "{query}");
        }
    }
}
