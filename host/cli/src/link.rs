//! The client's end of the control socket: one connection for each call, everything bounded.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::task::AbortHandle;

use crate::control::ErrorBody;
use crate::daemon::socket_path;

/// Longest document that the daemon may answer, in bytes: 65,536 handles have their place in it.
const ANSWER_BYTES: usize = 64 << 20;
/// Longest line of a stream, in bytes. An event's text is bounded far below it.
const LINE_BYTES: usize = 16 << 20;

/// Where the daemon is.
pub(crate) struct Link {
    path: PathBuf,
}

/// Ends the connection when it is dropped, whatever is under way on it: the daemon notices a client that has gone by this.
struct Connected(AbortHandle);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Link {
    /// To the daemon on `socket`, or on the default one.
    pub(crate) fn new(socket: Option<&Path>) -> Link {
        Link { path: socket_path(socket) }
    }

    /// One call, which may take `bound`. Dropping it ends its connection.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        url: &str,
        body: Option<&(impl serde::Serialize + ?Sized)>,
        bound: Duration,
    ) -> Result<T, ErrorBody> {
        let exchange = async {
            let (response, _connected) = self.ask(method, url, body).await?;
            let good = response.status().is_success();
            let bytes = self.whole(response).await?;
            if !good {
                return Err(error(&bytes));
            }
            serde_json::from_slice(&bytes)
                .map_err(|error| ErrorBody::failed(format!("the daemon answered something else: {error}")))
        };
        let silent =
            || ErrorBody::failed(format!("the daemon on {} has not answered for {bound:?}", self.path.display()));
        tokio::time::timeout(bound, exchange).await.unwrap_or_else(|_| Err(silent()))
    }

    /// A call whose answer is a stream of lines; it has to begin within `bound`.
    pub(crate) async fn lines(&self, url: &str, bound: Duration) -> Result<Lines, ErrorBody> {
        let begin = async {
            let (response, connected) = self.ask(Method::GET, url, None::<&()>).await?;
            if !response.status().is_success() {
                return Err(error(&self.whole(response).await?));
            }
            Ok(Lines { body: response.into_body(), kept: Vec::new(), _connected: connected })
        };
        let silent =
            || ErrorBody::failed(format!("the daemon on {} has not answered for {bound:?}", self.path.display()));
        tokio::time::timeout(bound, begin).await.unwrap_or_else(|_| Err(silent()))
    }

    async fn ask(
        &self,
        method: Method,
        url: &str,
        body: Option<&(impl serde::Serialize + ?Sized)>,
    ) -> Result<(Response<Incoming>, Connected), ErrorBody> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(ErrorBody::failed)?,
            None => Vec::new(),
        };
        let stream = tokio::net::UnixStream::connect(&self.path).await.map_err(|error| {
            ErrorBody::failed(format!(
                "cannot reach the daemon on {}: {error}; start one with 'cofferdam daemon', or say --socket",
                self.path.display()
            ))
        })?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(|error| self.lost(&error))?;
        let connected = Connected(tokio::spawn(connection).abort_handle());
        let request = Request::builder()
            .method(method)
            .uri(url)
            .header("host", "cofferdam")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(ErrorBody::failed)?;
        let response = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        Ok((response, connected))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ErrorBody> {
        let collected = Limited::new(response.into_body(), ANSWER_BYTES).collect().await;
        collected.map(http_body_util::Collected::to_bytes).map_err(|error| self.lost(&*error))
    }

    fn lost(&self, error: &dyn std::error::Error) -> ErrorBody {
        ErrorBody::failed(format!("the daemon on {} went away: {error}", self.path.display()))
    }
}

fn error(bytes: &[u8]) -> ErrorBody {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|_| ErrorBody::failed(format!("the daemon answered: {}", String::from_utf8_lossy(bytes))))
}

/// A stream of lines.
pub(crate) struct Lines {
    body: Incoming,
    kept: Vec<u8>,
    _connected: Connected,
}

/// How a stream ended.
pub(crate) enum End {
    /// The daemon said that this is all.
    Said,
    /// The connection broke.
    Broke,
}

impl Lines {
    /// The lines that came next, whole and with their ends; or how the stream ended.
    pub(crate) async fn next(&mut self) -> Result<Result<Vec<u8>, End>, ErrorBody> {
        loop {
            if let Some(end) = self.kept.iter().rposition(|byte| *byte == b'\n') {
                let rest = self.kept.split_off(end + 1);
                return Ok(Ok(std::mem::replace(&mut self.kept, rest)));
            }
            if self.kept.len() > LINE_BYTES {
                return Err(ErrorBody::failed("the daemon sent a line without an end"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.kept.extend_from_slice(frame.data_ref().map_or(&[][..], |data| &data[..])),
                Some(Err(_)) => return Ok(Err(End::Broke)),
                None => return Ok(Err(End::Said)),
            }
        }
    }
}
