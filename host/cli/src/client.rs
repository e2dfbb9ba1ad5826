//! The commands that ask a daemon.

use std::path::Path;
use std::time::Duration;

use cofferdam_manager::{BindingStatus, Certificate};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use crate::args::{InspectArgs, LoadArgs, LsArgs, UnloadArgs};
use crate::control::{ErrorBody, ErrorCode, UnloadBody};
use crate::daemon::socket_path;
use crate::{host, show, signals};

/// After this much waiting a person is told what is going on.
const PROGRESS: Duration = Duration::from_secs(2);

pub(crate) fn load(args: LoadArgs) -> Result<(), ErrorBody> {
    let body = host::load_body(&args.bind, args.pinned)?;
    let binding: BindingStatus = call(
        args.socket.socket.as_deref(),
        Method::POST,
        "/v1/bindings",
        Some(&body),
        "loading (a new driver is compiled once)",
    )?;
    if args.json {
        show::json(&binding)
    } else {
        show::serving(&binding)
    }
    Ok(())
}

pub(crate) fn ls(args: LsArgs) -> Result<(), ErrorBody> {
    let all: Vec<BindingStatus> =
        call(args.socket.socket.as_deref(), Method::GET, "/v1/bindings", None::<&()>, "listing")?;
    if args.json {
        show::json(&all)
    } else {
        show::table(&all)
    }
    Ok(())
}

pub(crate) fn inspect(args: InspectArgs) -> Result<(), ErrorBody> {
    let path = Path::new(&args.what);
    let looks_like_a_file = args.what.contains('/') || args.what.ends_with(".wasm") || path.is_file();
    if looks_like_a_file {
        let component = host::read_component(path)?;
        let manager = host::manager()?;
        let module =
            manager.runtime().load(&component).map_err(|error| ErrorBody::failed(format!("{}: {error}", args.what)))?;
        if args.json {
            show::module_json(module.info())
        } else {
            show::module(&args.what, module.info())
        }
        return Ok(());
    }
    let url = format!("/v1/bindings/{}", url_segment(&args.what)?);
    let binding: BindingStatus = call(args.socket.socket.as_deref(), Method::GET, &url, None::<&()>, "asking")?;
    if args.json {
        show::json(&binding)
    } else {
        show::binding(&binding)
    }
    Ok(())
}

pub(crate) fn unload(args: UnloadArgs) -> Result<(), ErrorBody> {
    let url = format!("/v1/bindings/{}/unload", url_segment(&args.name)?);
    let deadline_ms = u64::try_from(args.deadline.as_millis()).unwrap_or(u64::MAX);
    let body = UnloadBody { deadline_ms, force: args.force };
    let certificate: Certificate = call(args.socket.socket.as_deref(), Method::POST, &url, Some(&body), "draining")?;
    if args.json {
        show::json(&certificate)
    } else {
        show::certificate(&certificate)
    }
    Ok(())
}

/// A binding's name as a part of a path. What could not be a name cannot be a binding either.
fn url_segment(name: &str) -> Result<&str, ErrorBody> {
    if !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        && !name.starts_with('.')
    {
        return Ok(name);
    }
    Err(ErrorBody::new(ErrorCode::NoSuchThing, format!("no binding is called '{name}'")))
}

fn call<B: serde::Serialize, T: DeserializeOwned>(
    socket: Option<&Path>,
    method: Method,
    url: &str,
    body: Option<&B>,
    doing: &str,
) -> Result<T, ErrorBody> {
    let path = socket_path(socket);
    let body = match body {
        Some(body) => serde_json::to_vec(body).map_err(ErrorBody::failed)?,
        None => Vec::new(),
    };
    let runtime = signals::runtime()?;
    let (status, bytes) = runtime.block_on(async {
        let exchange = exchange(&path, method, url, body);
        tokio::pin!(exchange);
        loop {
            tokio::select! {
                result = &mut exchange => return result,
                () = tokio::time::sleep(PROGRESS) => tracing::warn!("{doing}..."),
            }
        }
    })?;
    if (200..300).contains(&status) {
        return serde_json::from_slice(&bytes)
            .map_err(|error| ErrorBody::failed(format!("the daemon answered something else: {error}")));
    }
    Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
        ErrorBody::failed(format!("the daemon answered {status}: {}", String::from_utf8_lossy(&bytes)))
    }))
}

async fn exchange(path: &Path, method: Method, url: &str, body: Vec<u8>) -> Result<(u16, Bytes), ErrorBody> {
    let stream = tokio::net::UnixStream::connect(path).await.map_err(|error| {
        ErrorBody::failed(format!(
            "cannot reach the daemon on {}: {error}; start one with 'cofferdam daemon', or say --socket",
            path.display()
        ))
    })?;
    let lost = |error: hyper::Error| ErrorBody::failed(format!("the daemon on {} went away: {error}", path.display()));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(url)
        .header("host", "cofferdam")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(ErrorBody::failed)?;
    let response = sender.send_request(request).await.map_err(lost)?;
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.map_err(lost)?.to_bytes();
    Ok((status, bytes))
}
