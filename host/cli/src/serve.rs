//! The daemon's connections: who may speak, and what of the daemon one client can have.
//!
//! Everything that a client can be slow at has a bound, because there are [`CONNECTIONS`] and an operator must always get one: its head, its document, and the reading
//! of its answer. Each connection carries one call, so that none is kept for a client that wants nothing.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::response::Response;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use crate::api::answer_error;
use crate::control::{DAEMON_HEADER, ErrorBody};
use crate::follow::HeldByConnection;

/// Control connections served at once. More than all the calls that may take long: see [`crate::api`] and [`crate::follow`].
const CONNECTIONS: usize = 64;
/// What may wait in one connection for a client that does not read, beside the document itself, in bytes.
const CONNECTION_BUFFER_BYTES: usize = 32 << 10;
/// Longest control document, in bytes.
const BODY_LIMIT_BYTES: usize = 64 << 10;
/// How long a client may take to say which call it makes, and then for the call's document.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take nothing of what it is sent.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves for ever.
pub(crate) async fn serve(listener: UnixListener, router: Router) -> Result<(), ErrorBody> {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let daemon = HeaderValue::from_str(&instance()).map_err(ErrorBody::failed)?;
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back instead of spinning.
                tracing::warn!(%error, "cannot accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !may_speak(&stream) {
            continue;
        }
        let (router, daemon) = (router.clone(), daemon.clone());
        tokio::spawn(async move {
            let _slot = slot;
            // Kept as long as the connection lasts.
            let held = Arc::new(Mutex::new(None));
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let (router, daemon, held) = (router.clone(), daemon.clone(), Arc::clone(&held));
                async move {
                    let mut response = call(router, request).await?;
                    *held.lock().unwrap_or_else(PoisonError::into_inner) =
                        response.extensions_mut().remove::<HeldByConnection>();
                    response.headers_mut().insert(DAEMON_HEADER, daemon);
                    Ok::<_, Infallible>(response)
                }
            });
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(WRITE_TIMEOUT));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .max_buf_size(CONNECTION_BUFFER_BYTES)
                .serve_connection(TokioIo::new(Box::pin(stream)), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "control connection ended");
            }
        });
    }
}

/// A text that no other daemon has: when this one began, in microseconds since 1970, and its process.
fn instance() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", now.as_micros(), std::process::id())
}

/// One call, with its whole document.
async fn call(mut router: Router, request: Request<Incoming>) -> Result<Response, Infallible> {
    use tower_service::Service;
    let (head, body) = request.into_parts();
    let whole = Limited::new(body, BODY_LIMIT_BYTES).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, whole).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let error = format!("a document of more than {BODY_LIMIT_BYTES} bytes is none of this interface");
            return Ok(answer_error(ErrorBody::usage(error)));
        }
        Ok(Err(error)) => return Ok(answer_error(ErrorBody::usage(format!("half a document: {error}")))),
        Err(_) => {
            let error = format!("the call's document did not come within {BODY_TIMEOUT:?}");
            return Ok(answer_error(ErrorBody::usage(error)));
        }
    };
    router.call(Request::from_parts(head, Body::from(body))).await
}

fn may_speak(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == own || peer.uid() == 0 => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "control connection refused");
            false
        }
        Err(_) => false,
    }
}
