//! The commands that ask a daemon.

use std::path::Path;
use std::time::Duration;

use cofferdam_manager::{BindingStatus, CrashReport, Explanation, HandleStatus, RevokeReport, UpgradeReport};
use hyper::Method;
use serde::de::DeserializeOwned;

use crate::args::{
    InspectArgs, LoadArgs, LsArgs, NameArgs, PortArgs, PortChangeArgs, PortCommand, RevokeArgs, RollbackArgs,
    UpgradeArgs,
};
use crate::control::{ErrorBody, PortBody, PortChange, RevokeBody, RollbackBody, UpgradeBody};
use crate::link::Link;
use crate::{host, show, signals};

/// After this much waiting a person is told what is going on.
pub(crate) const PROGRESS: Duration = Duration::from_secs(2);
/// How long the daemon may take for a call that waits for nothing, and how much longer than its deadline for one that waits.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);
/// How long it may take to load: a large driver is compiled once.
const LOAD: Duration = Duration::from_secs(600);

pub(crate) fn load(args: LoadArgs) -> Result<(), ErrorBody> {
    let body = host::load_body(&args.bind, args.pinned)?;
    let call = Call { doing: "loading (a new driver is compiled once)", bound: LOAD };
    let binding: BindingStatus = call.make(args.socket.socket.as_deref(), Method::POST, "/v1/bindings", Some(&body))?;
    if args.json {
        show::json(&binding)
    } else {
        show::serving(&binding)
    }
    Ok(())
}

pub(crate) fn ls(args: LsArgs) -> Result<(), ErrorBody> {
    let all: Vec<BindingStatus> = get(args.socket.socket.as_deref(), "/v1/bindings")?;
    if args.json {
        show::json(&all)
    } else {
        show::bindings(&all)
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
    let binding: BindingStatus = get(args.socket.socket.as_deref(), &url(&args.what, "")?)?;
    if args.json {
        show::json(&binding)
    } else {
        show::binding(&binding)
    }
    Ok(())
}

pub(crate) fn handles(args: NameArgs) -> Result<(), ErrorBody> {
    let handles: Vec<HandleStatus> = get(args.socket.socket.as_deref(), &url(&args.name, "/handles")?)?;
    if args.json {
        show::json(&handles)
    } else {
        show::handles(&args.name, &handles)
    }
    Ok(())
}

pub(crate) fn upgrade(args: UpgradeArgs) -> Result<(), ErrorBody> {
    let body = UpgradeBody {
        driver: host::absolute_path(&args.driver)?,
        deadline_ms: millis(args.deadline),
        probation_ms: millis(args.probation),
    };
    let call = Call { doing: "upgrading (a new driver is compiled once)", bound: LOAD };
    exchange(&call, &args.name, "/upgrade", args.socket.socket.as_deref(), &body, args.json)
}

pub(crate) fn roll_back(args: RollbackArgs) -> Result<(), ErrorBody> {
    let body = RollbackBody { deadline_ms: millis(args.deadline) };
    let call = Call { doing: "rolling back", bound: ANSWER };
    exchange(&call, &args.name, "/rollback", args.socket.socket.as_deref(), &body, args.json)
}

fn exchange(
    call: &Call,
    name: &str,
    rest: &str,
    socket: Option<&Path>,
    body: &impl serde::Serialize,
    json: bool,
) -> Result<(), ErrorBody> {
    let report: UpgradeReport = call.make(socket, Method::POST, &url(name, rest)?, Some(body))?;
    if json {
        show::json(&report)
    } else {
        show::upgraded(&report)
    }
    Ok(())
}

pub(crate) fn restart(args: NameArgs) -> Result<(), ErrorBody> {
    let call = Call { doing: "restarting", bound: ANSWER };
    let url = url(&args.name, "/restart")?;
    let binding: BindingStatus = call.make(args.socket.socket.as_deref(), Method::POST, &url, None::<&()>)?;
    if args.json {
        show::json(&binding)
    } else {
        show::serving(&binding)
    }
    Ok(())
}

pub(crate) fn crashes(args: NameArgs) -> Result<(), ErrorBody> {
    let crashes: Vec<CrashReport> = get(args.socket.socket.as_deref(), &url(&args.name, "/crashes")?)?;
    if args.json {
        show::json(&crashes)
    } else {
        show::crashes(&args.name, &crashes)
    }
    Ok(())
}

pub(crate) fn why(args: NameArgs) -> Result<(), ErrorBody> {
    let explanation: Explanation = get(args.socket.socket.as_deref(), &url(&args.name, "/why")?)?;
    if args.json {
        show::json(&explanation)
    } else {
        show::explanation(&explanation)
    }
    Ok(())
}

pub(crate) fn revoke(args: RevokeArgs) -> Result<(), ErrorBody> {
    let url = url(&args.name, &format!("/handles/{}/revoke", args.handle))?;
    let body = RevokeBody { deadline_ms: millis(args.deadline) };
    let call = Call { doing: "waiting for what the handle has in flight", bound: args.deadline + ANSWER };
    let report: RevokeReport = call.make(args.socket.socket.as_deref(), Method::POST, &url, Some(&body))?;
    if args.json {
        show::json(&report)
    } else {
        show::revoked(&report)
    }
    Ok(())
}

pub(crate) fn port(args: PortArgs) -> Result<(), ErrorBody> {
    let change = |args: &PortChangeArgs, url: &str, doing: &'static str| -> Result<PortChange, ErrorBody> {
        let body = PortBody { port: args.port.clone() };
        Call { doing, bound: ANSWER }.make(args.socket.socket.as_deref(), Method::POST, url, Some(&body))
    };
    let (args, change) = match args.command {
        PortCommand::Attach(args) => {
            let done = change(&args, &url(&args.name, "/ports/attach")?, "attaching")?;
            (args, done)
        }
        PortCommand::Detach(args) => {
            let done = change(&args, &url(&args.name, "/ports/detach")?, "detaching")?;
            (args, done)
        }
    };
    if args.json {
        show::json(&change)
    } else {
        show::port(&change)
    }
    Ok(())
}

/// A part of what is said of a binding, as a path. What could not be a name cannot be a binding either.
pub(crate) fn url(name: &str, rest: &str) -> Result<String, ErrorBody> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(good) {
        return Err(ErrorBody::no_such_thing(format!("no binding is called '{name}'")));
    }
    Ok(format!("/v1/bindings/{name}{rest}"))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn get<T: DeserializeOwned>(socket: Option<&Path>, url: &str) -> Result<T, ErrorBody> {
    Call { doing: "asking the daemon", bound: ANSWER }.make(socket, Method::GET, url, None::<&()>)
}

/// A call that nothing interrupts but its bound, with a word to a person who waits.
struct Call {
    doing: &'static str,
    bound: Duration,
}

impl Call {
    fn make<T: DeserializeOwned>(
        &self,
        socket: Option<&Path>,
        method: Method,
        url: &str,
        body: Option<&impl serde::Serialize>,
    ) -> Result<T, ErrorBody> {
        let link = Link::new(socket);
        signals::runtime()?.block_on(async {
            tokio::select! {
                result = link.call(method, url, body, self.bound) => result,
                never = progress(self.doing) => match never {},
            }
        })
    }
}

/// Says every two seconds what is being done; never ends.
pub(crate) async fn progress(doing: &str) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(PROGRESS).await;
        tracing::warn!("{doing}...");
    }
}
