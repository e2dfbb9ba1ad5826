//! The granted parts of WASI 0.2, by wasmtime-wasi, and nothing that was not granted.
//!
//! What blocks: `wasi:io/poll` is bounded here (see `poll`); standard streams never block; file calls take as long as the file system behind the granted directory takes
//! (a named pipe or a dead network mount in there can hold the lane's thread, which is why the directory is the operator's choice).

use std::os::fd::{AsFd, AsRawFd};

use wasmtime::component::{HasData, Linker, ResourceTable};
use wasmtime_wasi::cli::{WasiCli, WasiCliView};
use wasmtime_wasi::clocks::{WasiClocks, WasiClocksView};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView};
use wasmtime_wasi::p2::bindings::{cli, clocks, filesystem, io, random, sync};
use wasmtime_wasi::random::{WasiRandom, WasiRandomView};
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use crate::activity::Import;
use crate::bindings::cofferdam::driver::log::Level;
use crate::capability::log::LogSink;
use crate::capability::output::LogOutput;
use crate::capability::poll;
use crate::error::InstantiateError;
use crate::grants::Grants;
use crate::state::LaneState;

/// Random bytes in one call, at most: the host allocates them.
const MAX_RANDOM_BYTES: u64 = 64 * 1024;

/// What a guest holds of WASI. `Default` is a context that can do nothing.
#[derive(Default)]
pub(crate) struct WasiState {
    ctx: WasiCtx,
    pub(crate) table: ResourceTable,
}

impl WasiState {
    pub(crate) fn new(grants: &Grants, log: &LogSink) -> Result<WasiState, InstantiateError> {
        let mut builder = WasiCtxBuilder::new();
        builder.max_random_size(MAX_RANDOM_BYTES);
        builder.stdout(LogOutput::new(Level::Info, log.clone()));
        builder.stderr(LogOutput::new(Level::Warn, log.clone()));
        for grant in &grants.filesystem {
            // The descriptor that the grant holds, not the path: the path may name something else by now.
            let path = format!("/proc/self/fd/{}", grant.dir().as_fd().as_raw_fd());
            let name = grant.path().display().to_string();
            if let Err(error) = builder.preopened_dir(&path, &name, FsPerms::ReadWrite) {
                return Err(InstantiateError::Directory { path: name, reason: error.to_string() });
            }
        }
        Ok(WasiState { ctx: builder.build(), table: ResourceTable::new() })
    }
}

impl WasiView for LaneState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let wasi = self.wasi.get_or_insert_default();
        WasiCtxView { ctx: &mut wasi.ctx, table: &mut wasi.table }
    }
}

struct HasTable;

impl HasData for HasTable {
    type Data<'a> = &'a mut ResourceTable;
}

impl LaneState {
    /// Marks the import that begins here. These functions are wasmtime-wasi's, which tells when they begin and not when they end: the mark goes at the next epoch tick in
    /// code of the guest's own, at its next import or at the end of its call.
    fn within(&mut self, import: Import) -> &mut LaneState {
        self.watch.activity().import(import);
        self
    }
}

/// Links what `grants` say.
pub(crate) fn link(linker: &mut Linker<LaneState>, grants: &Grants) -> wasmtime::Result<()> {
    let l = linker;
    if grants.has_io() {
        io::error::add_to_linker::<_, HasTable>(l, |state| state.ctx().table)?;
        poll::link(l)?;
        sync::io::streams::add_to_linker::<_, HasTable>(l, |state| state.within(Import::WasiStreams).ctx().table)?;
    }
    if grants.wasi_clocks {
        clocks::wall_clock::add_to_linker::<_, WasiClocks>(l, |state| state.within(Import::WasiClocks).clocks())?;
        clocks::monotonic_clock::add_to_linker::<_, WasiClocks>(l, |state| state.within(Import::WasiClocks).clocks())?;
    }
    if grants.wasi_random {
        random::random::add_to_linker::<_, WasiRandom>(l, |state| state.within(Import::WasiRandom).random())?;
        random::insecure::add_to_linker::<_, WasiRandom>(l, |state| state.within(Import::WasiRandom).random())?;
        random::insecure_seed::add_to_linker::<_, WasiRandom>(l, |state| state.within(Import::WasiRandom).random())?;
    }
    if grants.wasi_cli {
        cli::exit::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::environment::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::stdin::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::stdout::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::stderr::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::terminal_input::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::terminal_output::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::terminal_stdin::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::terminal_stdout::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
        cli::terminal_stderr::add_to_linker::<_, WasiCli>(l, |state| state.within(Import::WasiCli).cli())?;
    }
    if grants.has_filesystem() {
        filesystem::preopens::add_to_linker::<_, WasiFilesystem>(l, |state| {
            state.within(Import::WasiFilesystem).filesystem()
        })?;
        sync::filesystem::types::add_to_linker::<_, WasiFilesystem>(l, |state| {
            state.within(Import::WasiFilesystem).filesystem()
        })?;
    }
    Ok(())
}
