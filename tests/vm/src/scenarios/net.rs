//! A network card with a TAP interface in front of it, in one network namespace, and at the other end of its cable one that is the kernel's, in another.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::host::{Host, kernel_has_interface, nothing_is_claimed};
use crate::network::{
    FAR, FAR_ADDRESS, IPERF_MORE, NEAR, NEAR_ADDRESS, Namespaces, Server, has_carrier, inside, ip, link, ping,
};
use crate::pci::{Function, NET0};
use crate::vm::{SHORT, Vm};

/// The interface.
pub(super) const TAP: &str = "cof0";

/// What the device says of itself (`xtask/src/vm/topology.rs`).
const MAC: &str = "52:54:00:00:00:10";
pub(super) const DEVICE_MTU: u32 = 9000;

/// A card that a host serves, in its namespace.
pub(super) struct Scene {
    pub(super) host: Host,
    pub(super) card: Function,
    pub(super) namespaces: Namespaces,
}

impl Scene {
    /// Loads the driver, and has the interface moved.
    pub(super) fn set(vm: &Vm, mtu: u32) -> Result<Scene> {
        let card = NET0.function()?;
        kernel_has_interface(vm, &card)?;
        let namespaces = Namespaces::new(vm, mtu)?;
        let host = Host::start(vm)?;
        let scene = Scene { host, card, namespaces };
        scene.load(vm, mtu)?;
        Ok(scene)
    }

    /// Loads the driver, and does what an operator does as soon as the interface is there.
    pub(super) fn load(&self, vm: &Vm, mtu: u32) -> Result<()> {
        self.host.load_net(vm, &self.card, TAP)?;
        self.namespaces.near(vm, TAP, mtu)
    }

    /// Unloads it: nothing is left of the interface, and the kernel's driver has the card again, with an interface.
    pub(super) fn unload(&self, vm: &Vm) -> Result<()> {
        let certificate = self.host.unload(vm, "net")?;
        ensure!(certificate["outcome"] == "unloaded", "{certificate}");
        ensure!(link(vm, NEAR, TAP)?.is_none(), "the interface is still there");
        kernel_has_interface(vm, &self.card)?;
        nothing_is_claimed()
    }

    pub(super) fn end(self, vm: &Vm) -> Result<()> {
        self.unload(vm)?;
        self.host.end()
    }
}

/// What the kernel serves is served, with the device's own address and MTU, and pinged from both ends; then it is the kernel's again.
pub(super) fn pings(vm: &mut Vm) -> Result<()> {
    let card = NET0.function()?;
    kernel_has_interface(vm, &card)?;
    let namespaces = Namespaces::new(vm, DEVICE_MTU)?;
    let host = Host::start(vm)?;
    host.load_net(vm, &card, TAP)?;
    vm.step("loaded");
    let made = vm.run(["ip", "-j", "link", "show", "dev", TAP])?.success()?.json()?[0].clone();
    ensure!(made["address"] == MAC && made["mtu"] == DEVICE_MTU, "not the device's: {made}");
    let is_up = made["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "LOWER_UP"));
    ensure!(is_up, "it does not come up: {made}");
    namespaces.near(vm, TAP, DEVICE_MTU)?;
    ping(vm, NEAR, FAR_ADDRESS, 84, 50)?;
    ping(vm, FAR, NEAR_ADDRESS, 84, 50)?;
    let known = ip(vm, FAR, "neighbour show")?.saying(MAC)?;
    vm.step(&format!("pinged both ways; the far end knows {}", known.stdout.trim()));
    let scene = Scene { host, card, namespaces };
    scene.unload(vm)?;
    vm.step("unloaded");
    // The same by the kernel's driver, with what it has now.
    let own = kernel_has_interface(vm, &scene.card)?;
    let Scene { host, card, namespaces } = scene;
    namespaces.near(vm, &own, DEVICE_MTU)?;
    ping(vm, NEAR, FAR_ADDRESS, 84, 5)?;
    drop(namespaces);
    vm.wait_until("it is back from its namespace", SHORT, || Ok(card.interface().is_some()))?;
    host.end()
}

/// Packets of the full size pass whole, at the MTU of Ethernet and at the device's own, and one byte more does not fit.
pub(super) fn full_sizes(vm: &mut Vm) -> Result<()> {
    let scene = Scene::set(vm, DEVICE_MTU)?;
    for mtu in [DEVICE_MTU, 1500] {
        ip(vm, NEAR, &format!("link set {TAP} mtu {mtu}"))?;
        ip(vm, FAR, &format!("link set {} mtu {mtu}", scene.namespaces.far))?;
        for (from, to) in [(NEAR, FAR_ADDRESS), (FAR, NEAR_ADDRESS)] {
            // The least that ping times, around the sizes of buffers, and the most.
            for bytes in [44, 1500, mtu - 1, mtu] {
                ping(vm, from, to, bytes, 5)?;
            }
            let much = mtu + 1 - 28;
            let line = format!("ip netns exec {from} ping -q -M do -c 1 -W 1 -s {much} {to}");
            let refused = vm.run(line.split(' ').collect::<Vec<_>>())?.refusal()?;
            ensure!(refused.stdout.contains("0 received"), "{}", refused.stdout);
        }
        vm.step(&format!("packets of up to {mtu} bytes both ways"));
    }
    scene.end(vm)
}

/// The connections of TCP that a namespace has to iperf3's port: their other ports.
pub(super) fn connections(vm: &Vm) -> Result<Vec<u64>> {
    let text = inside(vm, NEAR, "cat /proc/net/tcp")?.stdout;
    let port = |address: &str| u64::from_str_radix(address.split(':').nth(1)?, 16).ok();
    let mut ports = Vec::new();
    for line in text.lines().skip(1) {
        let words: Vec<_> = line.split_whitespace().collect();
        // Local, remote, state: 01 is ESTABLISHED.
        if let [_, local, remote, "01", ..] = words[..]
            && port(remote) == Some(5201)
        {
            ports.extend(port(local));
        }
    }
    ports.sort_unstable();
    Ok(ports)
}

/// How many bytes an interface has received and sent.
fn moved(vm: &Vm, namespace: &str, interface: &str) -> Result<u64> {
    let line =
        format!("cat /sys/class/net/{interface}/statistics/rx_bytes /sys/class/net/{interface}/statistics/tx_bytes");
    let text = inside(vm, namespace, &line)?.stdout;
    Ok(text.lines().filter_map(|line| line.parse::<u64>().ok()).sum())
}

/// Waits until so much more has moved at the far end.
pub(super) fn until_moved(vm: &Vm, scene: &Scene, bytes: u64) -> Result<()> {
    let far = &scene.namespaces.far;
    let before = moved(vm, FAR, far)?;
    vm.wait_until("bytes move", SHORT, || Ok(moved(vm, FAR, far)? >= before + bytes))
}

/// How much is much: more than buffers hold.
pub(super) const MUCH: u64 = 6 << 20;

/// A connection of TCP stands while the driver is unloaded under it and loaded again, and is the same one after.
pub(super) fn reloads(vm: &mut Vm) -> Result<()> {
    // By amount, not by time: on a slow machine it only takes longer.
    const ALL: u64 = 8 * MUCH;
    let scene = Scene::set(vm, 1500)?;
    let server = Server::start(vm)?;
    for options in ["", "-R"] {
        let mut client = server.client(vm, &format!("-n {ALL} {options}"))?;
        until_moved(vm, &scene, MUCH)?;
        let before = connections(vm)?;
        ensure!(before.len() == 2, "not one for control and one for data: {before:?}");
        vm.step(&format!("iperf3 {options} at work on ports {before:?}; unload"));
        scene.unload(vm)?;
        vm.step("unloaded; load");
        ensure!(client.process.is_alive()?, "iperf3 has ended: {}", client.process.stdout());
        scene.load(vm, 1500)?;
        vm.step("loaded");
        until_moved(vm, &scene, MUCH)?;
        let after = connections(vm)?;
        ensure!(after == before, "{before:?} became {after:?}");
        vm.step("the connection goes on");
        let flow = client.end(IPERF_MORE)?;
        ensure!(before.contains(&flow.port), "{} is none of {before:?}", flow.port);
        let silent = flow.each_second.iter().filter(|bits| **bits == 0.0).count();
        let (rate, sent) = (flow.megabits(), flow.retransmits);
        vm.step(&format!("{rate:.0} Mbit/s over all, {silent} seconds of silence, {sent} segments sent again"));
    }
    drop(server);
    scene.end(vm)
}

/// The carrier is as the device's link, under traffic, which goes on when it is back.
pub(super) fn link_flaps(vm: &mut Vm) -> Result<()> {
    let scene = Scene::set(vm, 1500)?;
    let server = Server::start(vm)?;
    let mut client = server.client(vm, &format!("-n {}", 8 * MUCH))?;
    until_moved(vm, &scene, MUCH)?;
    ensure!(has_carrier(vm, NEAR, TAP)?, "no carrier to begin with");
    for _ in 0..3 {
        for up in [false, true] {
            vm.outside("set_link", &json!({ "name": NET0.id, "up": up }))?;
            vm.wait_until("the carrier follows the link", SHORT, || Ok(has_carrier(vm, NEAR, TAP)? == up))?;
        }
    }
    vm.step("three times off and on");
    // Faster than anybody can follow: what counts is where it ends.
    for flap in 0..40 {
        vm.outside("set_link", &json!({ "name": NET0.id, "up": flap % 2 == 1 }))?;
    }
    vm.wait_until("the carrier is back", SHORT, || has_carrier(vm, NEAR, TAP))?;
    until_moved(vm, &scene, MUCH)?;
    vm.step("forty flaps later the connection goes on");
    ensure!(client.process.is_alive()?, "iperf3 has ended: {}", client.process.stdout());
    let flow = client.end(IPERF_MORE)?;
    vm.step(&format!("{:.0} Mbit/s", flow.megabits()));
    drop(server);
    scene.end(vm)
}
