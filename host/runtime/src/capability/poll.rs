//! `wasi:io/poll`, bounded. wasmtime-wasi's synchronous form would hold the host's thread for as long as the guest likes to sleep, and epochs do not
//! reach into it; this one gives up at the call's deadline and at the kill switch.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime_wasi::p2::DynPollable;
use wasmtime_wasi::p2::bindings::io::poll as async_poll;
use wasmtime_wasi::p2::bindings::sync::io::poll;
use wasmtime_wasi::runtime::in_tokio;

use crate::activity::Import;
use crate::state::LaneState;
use crate::watch::Watch;

/// How often a sleeping guest is looked after.
const SLICE: Duration = Duration::from_millis(10);

/// Pollables that one `poll` may name. wasmtime-wasi builds a list of this length in the host.
const MAX_POLLABLES: usize = 1_024;

pub(crate) struct BoundedPoll<'a> {
    table: &'a mut ResourceTable,
    watch: &'a mut Watch,
}

struct HasPoll;

impl HasData for HasPoll {
    type Data<'a> = BoundedPoll<'a>;
}

pub(crate) fn link(linker: &mut Linker<LaneState>) -> wasmtime::Result<()> {
    poll::add_to_linker::<_, HasPoll>(linker, |state| {
        let LaneState { wasi, watch, .. } = state;
        BoundedPoll { table: &mut wasi.get_or_insert_default().table, watch }
    })
}

/// Waits for `future` and looks at the watch every [`SLICE`]. A wait is the guest's own time: unlike a capability's call it counts against the deadline.
fn wait<R>(watch: &mut Watch, future: impl Future<Output = wasmtime::Result<R>>) -> wasmtime::Result<R> {
    let activity = Arc::clone(watch.shared_activity());
    let _within = activity.within(Import::WasiPoll);
    in_tokio(async {
        let mut future = pin!(future);
        loop {
            match tokio::time::timeout(SLICE, future.as_mut()).await {
                Ok(result) => return result,
                Err(_) => watch.tick(Instant::now())?,
            }
        }
    })
}

impl poll::Host for BoundedPoll<'_> {
    fn poll(&mut self, pollables: Vec<Resource<DynPollable>>) -> wasmtime::Result<Vec<u32>> {
        if pollables.len() > MAX_POLLABLES {
            return Err(wasmtime::Error::msg("poll names more than 1,024 pollables"));
        }
        wait(self.watch, async_poll::Host::poll(self.table, pollables))
    }
}

impl poll::HostPollable for BoundedPoll<'_> {
    fn ready(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<bool> {
        wait(self.watch, async_poll::HostPollable::ready(self.table, pollable))
    }

    fn block(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        wait(self.watch, async_poll::HostPollable::block(self.table, pollable))
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        async_poll::HostPollable::drop(self.table, pollable)
    }
}
