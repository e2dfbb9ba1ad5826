//! What `--help` says after the list of options: examples that work as typed, and the exit codes of the command.

/// `cofferdam --help`.
pub(crate) const ALL: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 no such thing, 4 still draining: what was asked for is under way, but the device or the driver still holds something.
Data goes to stdout, diagnostics to stderr. COFFERDAM_LOG sets the log filter (default: info for daemon and run, warn otherwise).

Examples:
  cofferdam run virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:/run/disk.sock
  cofferdam daemon &
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:127.0.0.1:10809 --name disk0
  cofferdam port attach disk0 data:/run/disk.data
  cofferdam port attach net0 tap:lan0
  cofferdam port attach rng0 fifo:/run/random
  cofferdam port attach console0 pty:/run/console,port=1
  cofferdam ls
  cofferdam events --follow &
  cofferdam why disk0
  cofferdam unload disk0 --deadline 5s --explain
  cofferdam upgrade disk0 virtio-blk-2.wasm
  cofferdam rollback disk0
  cofferdam crashes disk0
  cofferdam restart disk0
  cofferdam doctor
  cofferdam devices
  cofferdam bind pci:0000:00:04.0 --dry-run";

/// `cofferdam run --help`.
pub(crate) const RUN: &str = "\
Ctrl-C while it loads calls the load off.
With --port stdio the console is this terminal, Ctrl-] unloads, and everything that is not the console's goes to standard error. With pipes every byte is passed on, and the end of the input unloads when the device has said nothing for half a second.
Exit codes: 0 unloaded, 1 could not serve or the binding left by itself, 2 usage, 3 no such driver file or device, 4 still draining even after the force.

Examples:
  cofferdam run virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:/run/disk.sock
  cofferdam run virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:127.0.0.1:10809 --queues 2 --json
  cofferdam run virtio-console.wasm --device vhost-user:/run/console.sock --port stdio
  cofferdam run virtio-console.wasm --device vhost-user:/run/console.sock --port stdio <commands >answers 2>log";

/// `cofferdam daemon --help`.
pub(crate) const DAEMON: &str = "\
On SIGTERM or Ctrl-C every binding is unloaded, by force where it must be, within five seconds.
With --takeover the daemon that serves the socket hands over everything and ends; its clients wait for a moment and see no error. What cannot be handed over (data ports with clients, functions behind iommufd, pinned bindings) is named, and that daemon serves on. See docs/RECOVERY.md.
Exit codes: 0 stopped, or another daemon has taken over; 1 failed, 2 usage.

Examples:
  cofferdam daemon
  cofferdam daemon --socket /run/cofferdam-test.sock
  cofferdam daemon --takeover
  cofferdam daemon --takeover --deadline 500ms --json";

/// `cofferdam load --help`.
pub(crate) const LOAD: &str = "\
Without a driver, the one that lists the device's id is taken ('cofferdam inspect DRIVER.wasm' shows them); several that do are an error that names them.
Exit codes: 0 it serves, 1 failed and everything was given back, 2 usage, 3 no such driver or device.

Examples:
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:/run/disk.sock --name disk0
  cofferdam load --device pci:0000:00:04.0 --port nbd:/run/disk.sock --drivers target/drivers
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --queues 4 --memory-mib 16 --json
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:/run/disk.sock --reconnect
  cofferdam load --device pci:0000:00:04.0 --port nbd:/run/disk.sock --reconnect=2m
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --port data:/run/disk.data --mapped-handles 4 --mapped-mib 64
  cofferdam load virtio-rng.wasm --device vhost-user:/run/rng.sock --port fifo:/run/random --port entropy-pool
  cofferdam load virtio-console.wasm --device vhost-user:/run/console.sock --queues 2 --port pty:/run/console --port pty:/run/agent,port=1";

/// `cofferdam upgrade --help`.
pub(crate) const UPGRADE: &str = "\
The new driver has to give the same service, to list the same devices, and to plan the queues that the device runs with; the device is not reset. Its grants and limits are those of the load.
Exit codes: 0 the new driver serves, 1 it does not and the old one serves, 2 usage, 3 no such binding or file.

Examples:
  cofferdam upgrade disk0 virtio-blk-2.wasm
  cofferdam upgrade disk0 virtio-blk-2.wasm --deadline 200ms --probation 1m --json
  cofferdam rollback disk0";

/// `cofferdam rollback --help`.
pub(crate) const ROLLBACK: &str = "\
Exit codes: 0 the driver before serves, 1 it does not and the one that was there serves, 2 usage, 3 no such binding.

Examples:
  cofferdam rollback disk0
  cofferdam rollback disk0 --json";

/// `cofferdam restart --help`.
pub(crate) const RESTART: &str = "\
What was lost to the failure was answered with errors; what is on the device's rings was not touched and is answered as it completes.
Of a binding whose device did not come back (--reconnect) the command returns at once, and the device is waited for as long as at first: 'recovering'.
Exit codes: 0 it serves or waits for its device, 1 it failed again or has not failed, 2 usage, 3 no such binding.

Examples:
  cofferdam restart disk0
  cofferdam restart disk0 --json";

/// `cofferdam crashes --help`.
pub(crate) const CRASHES: &str = "\
Reports and core dumps are written to $XDG_STATE_HOME/cofferdam/crashes [default: ~/.local/state/cofferdam/crashes], at most 64 and 256 MiB of them, the oldest go first.
A core dump is in the format of the WebAssembly tool conventions (Coredump.md).
Exit codes: 0 done, 1 failed, 2 usage, 3 no such binding.

Examples:
  cofferdam crashes disk0
  cofferdam crashes disk0 --json";

/// `cofferdam ls --help`.
pub(crate) const LS: &str = "\
Exit codes: 0 done, 1 failed, 2 usage.

Examples:
  cofferdam ls
  cofferdam ls --json";

/// `cofferdam inspect --help`.
pub(crate) const INSPECT: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 no such file or binding.

Examples:
  cofferdam inspect virtio-blk.wasm
  cofferdam inspect disk0 --json";

/// `cofferdam handles --help`.
pub(crate) const HANDLES: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 no such binding.

Examples:
  cofferdam handles disk0
  cofferdam handles disk0 --json";

/// `cofferdam revoke --help`.
pub(crate) const REVOKE: &str = "\
Exit codes: 0 revoked and everything of it answered, 1 failed, 2 usage, 3 no such binding or handle, 4 revoked, but requests of it are still with the device.

Examples:
  cofferdam revoke disk0 7
  cofferdam revoke disk0 7 --deadline 500ms --json";

/// `cofferdam why --help`.
pub(crate) const WHY: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 no such binding, not among the last that left either.

Examples:
  cofferdam why disk0
  cofferdam why disk0 --json";

/// `cofferdam events --help`.
pub(crate) const EVENTS: &str = "\
Numbers count from the daemon's start; the last 4096 events are kept. A number not given out yet is taken for one of an earlier daemon: then it begins with the oldest. A reader that is too slow is told how many it missed.
Exit codes: 0 done, Ctrl-C, or the daemon has ended while it was followed; 1 failed (also: 16 others follow already, or 8 others are being answered), 2 usage.

Examples:
  cofferdam events
  cofferdam events --follow
  cofferdam events --since 120 --follow --json";

/// `cofferdam unload --help`.
pub(crate) const UNLOAD: &str = "\
Ctrl-C ends the wait, not the unload: the binding stays draining.
Exit codes: 0 unloaded, 1 refused or failed, 2 usage, 3 no such binding, 4 the wait is over and it is still draining.

Examples:
  cofferdam unload disk0
  cofferdam unload disk0 --deadline 30s --explain
  cofferdam unload disk0 --force --json";

/// `cofferdam port --help`.
pub(crate) const PORT: &str = "\
nbd: serves any NBD client; data: serves programs that use cofferdam-client (examples/zero-copy), in memory that they share with the device. Both need a disk.
fifo: random bytes for whoever reads it; entropy-pool[,rate=BYTES] credits the kernel's pool with 64 bytes a second (root). Both need an entropy device.
pty: a link to a pseudo terminal, for port N of a console with ',port=N' (more than port 0 need --queues); stdio is for 'cofferdam run' alone.
tap: makes an interface of a network device in this network namespace, as long as the binding or the port lasts; needs CAP_NET_ADMIN.
Exit codes: 0 done, 1 failed, 2 a bad address, 3 no such binding or port.

Examples:
  cofferdam port attach disk0 nbd:/run/disk.sock
  cofferdam port attach disk0 nbd:127.0.0.1:0
  cofferdam port attach disk0 data:/run/disk.data
  cofferdam port detach disk0 nbd:/run/disk.sock --json";

/// `cofferdam devices --help`.
pub(crate) const DEVICES: &str = "\
A running daemon is asked for the names of its bindings; without one, claims show the process.
Exit codes: 0 done, 1 failed, 2 usage.

Examples:
  cofferdam devices
  cofferdam devices --json";

/// `cofferdam bind --help`.
pub(crate) const BIND: &str = "\
Interrupted anywhere, the same command finishes it, and 'cofferdam unbind' takes it back. docs/DEVICES.md has the whole story.
Exit codes: 0 it has it, 1 refused or failed, 2 usage, 3 no such function.

Examples:
  cofferdam bind pci:0000:00:04.0 --dry-run
  cofferdam bind pci:0000:00:04.0
  cofferdam bind pci:0000:00:04.0 --uio --json";

/// `cofferdam unbind --help`.
pub(crate) const UNBIND: &str = "\
A function that a living binding has is refused: unload that first.
Exit codes: 0 it is back, 1 refused or failed, 2 usage, 3 no such function.

Examples:
  cofferdam unbind pci:0000:00:04.0 --dry-run
  cofferdam unbind pci:0000:00:04.0";

/// `cofferdam doctor --help`.
pub(crate) const DOCTOR: &str = "\
Exit codes: 0 everything is there that devices over vhost-user need, 1 something of that is missing, 2 usage.

Examples:
  cofferdam doctor
  cofferdam doctor --json";
