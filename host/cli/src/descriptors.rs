//! How many descriptors the daemon may have open.
//!
//! A client costs one, or two with memory that it maps; a lane four to six. While another daemon takes over, everything has a duplicate for a moment, in this process until it is sent and in that one from then on:
//! a daemon may need twice what it has. The soft limit that most shells and supervisors leave (1,024) is for programs that use `select(2)`, which this one does not.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one, which needs no privilege. Without that the daemon serves as well, as far as its limit goes.
pub(crate) fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // `None` is no limit.
    if current.is_none() || current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => tracing::debug!(from = current, to = maximum, "limit of open descriptors raised"),
        Err(error) => tracing::warn!(%error, limit = current, "the limit of open descriptors stays"),
    }
}
