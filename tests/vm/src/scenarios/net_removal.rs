//! A network card that goes away under traffic.

use anyhow::{Result, ensure};

use crate::host::{Host, is_clean, kernel_has_interface, nothing_is_claimed};
use crate::network::{NEAR, inside, ip, link};
use crate::pci::NET2;
use crate::vm::{SHORT, Vm};

const TAP: &str = "cof2";

/// Who answers in QEMU's own network, and an address there.
const GATEWAY: &str = "10.0.2.2";
const ADDRESS: &str = "10.0.2.15/24";

/// The kernel asks before it lets a card go, and gets it; the interface goes with it.
pub(super) fn unplugged(vm: &mut Vm) -> Result<()> {
    let _ = vm.run(["ip", "netns", "delete", NEAR]);
    vm.plug(&NET2)?;
    let card = NET2.function()?;
    kernel_has_interface(vm, &card)?;
    vm.run(["ip", "netns", "add", NEAR])?.success()?;
    let mut host = Host::start(vm)?;
    host.load_net(vm, &card, TAP)?;
    vm.run(["ip", "link", "set", TAP, "netns", NEAR])?.success()?;
    ip(vm, NEAR, &format!("address add {ADDRESS} dev {TAP}"))?;
    ip(vm, NEAR, &format!("link set {TAP} up"))?;
    inside(vm, NEAR, &format!("ping -q -c 3 -i 0.01 -W 10 {GATEWAY}"))?.saying("3 received")?;
    let mut flood = vm.spawn("flood", ["ip", "netns", "exec", NEAR, "ping", "-q", "-f", "-s", "1000", GATEWAY])?;
    let sent = |vm: &Vm| -> Result<u64> {
        Ok(inside(vm, NEAR, &format!("cat /sys/class/net/{TAP}/statistics/rx_packets"))?.stdout.trim().parse()?)
    };
    vm.wait_until("answers come", SHORT, || Ok(sent(vm)? > 500))?;
    vm.step("pings are answered; device_del");
    ensure!(flood.is_alive()?, "ping has ended: {}", flood.stdout());
    vm.unplug(&NET2)?;
    vm.step("the kernel let go of it");
    let certificate = host.leaves_by_itself(vm, "net")?;
    ensure!(certificate["outcome"] == "removed", "{certificate}");
    is_clean(&certificate)?;
    ensure!(link(vm, NEAR, TAP)?.is_none(), "the interface is still there");
    nothing_is_claimed()?;
    ensure!(host.process.is_alive()?, "the daemon has ended");
    drop(flood);
    vm.run(["ip", "netns", "delete", NEAR])?.success()?;
    host.end()
}
