//! Networks and consoles on one daemon after the other, with traffic both ways: buffers lie with the device meanwhile, and packets and bytes come.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::console;
use super::net::{MUCH, Scene, TAP, connections, until_moved};
use super::takeover::as_started;
use crate::challenger::take_everything;
use crate::host::{DOOR, Host};
use crate::network::{FAR, FAR_ADDRESS, NEAR, NEAR_ADDRESS, Pings, Server, has_carrier, link};
use crate::pci::{CONSOLE0, NET0, Place};
use crate::vm::{SHORT, Vm};

/// New daemons under each kind of traffic.
const DAEMONS: usize = 3;

/// How long iperf3 goes on if it is not ended.
const ENDLESS_SECONDS: u32 = 3600;

/// Bytes that some dozen pings move.
const PINGED: u64 = 10_000;

/// A new daemon takes over; the device is as it was.
fn takes_over(vm: &mut Vm, host: &mut Host, place: &Place, what: &str) -> Result<()> {
    let before = as_started(vm, place)?;
    let told = host.take_over(vm)?;
    vm.step(&told);
    ensure!(told.starts_with(&format!("took over 1 binding and {what}")), "{told}");
    let now = as_started(vm, place)?;
    ensure!(now == before, "the device was {before} and is {now}");
    ensure!(place.function()?.is_master()?, "it does not master the bus");
    Ok(())
}

/// No ping is lost, a connection of TCP goes on, and nobody hears of a change of the interface.
pub(super) fn network(vm: &mut Vm) -> Result<()> {
    let mut scene = Scene::set(vm, 1500)?;
    // What the device says while nobody listens is heard by whoever has it then.
    for up in [false, true] {
        let hands = take_everything(Path::new(DOOR), Duration::from_secs(5))?;
        vm.outside("set_link", &json!({ "name": NET0.id, "up": up }))?;
        drop(hands);
        vm.wait_until("the carrier follows the link", SHORT, || Ok(has_carrier(vm, NEAR, TAP)? == up))?;
    }
    let interface = |vm: &Vm| link(vm, NEAR, TAP)?.context("no interface");
    vm.wait_until("the interface is up", SHORT, || Ok(interface(vm)?["operstate"] == "UP"))?;
    let was = interface(vm)?;
    let mut monitor = vm.spawn("monitor", ["ip", "-n", NEAR, "monitor", "link"])?;
    for (from, to) in [(NEAR, FAR_ADDRESS), (FAR, NEAR_ADDRESS)] {
        let pings = Pings::start(vm, from, to)?;
        until_moved(vm, &scene, PINGED)?;
        drop(take_everything(Path::new(DOOR), Duration::from_secs(5))?);
        vm.step("one has died with everything in its hands");
        until_moved(vm, &scene, PINGED)?;
        for _ in 0..DAEMONS {
            takes_over(vm, &mut scene.host, &NET0, "1 connection")?;
            until_moved(vm, &scene, PINGED)?;
        }
        let answered = pings.end()?;
        vm.step(&format!("{answered} pings from namespace {from}, all of them answered, once"));
    }
    for direction in ["", "-R"] {
        let server = Server::start(vm)?;
        let mut client = server.client(vm, &format!("-t {ENDLESS_SECONDS} {direction}"))?;
        until_moved(vm, &scene, MUCH)?;
        let before = connections(vm)?;
        ensure!(before.len() == 2, "not one for control and one for data: {before:?}");
        for _ in 0..DAEMONS {
            takes_over(vm, &mut scene.host, &NET0, "1 connection")?;
            until_moved(vm, &scene, MUCH)?;
        }
        ensure!(client.process.is_alive()?, "iperf3 has ended: {}", client.process.stdout());
        let after = connections(vm)?;
        ensure!(after == before, "{before:?} became {after:?}");
        vm.step(&format!("iperf3 {direction} goes on on ports {before:?}"));
    }
    let is = interface(vm)?;
    ensure!(is == was, "the interface was {was} and is {is}");
    ensure!(monitor.is_alive()?, "nobody listened: {}", monitor.stderr());
    ensure!(monitor.stdout().is_empty(), "somebody heard of a change: {}", monitor.stdout());
    scene.end(vm)
}

/// Bytes both ways arrive whole and in order, in a terminal that stays open.
fn terminal(vm: &mut Vm, via: &str) -> Result<()> {
    console::paste_while(vm, via, DAEMONS, |vm, host| takes_over(vm, host, &CONSOLE0, "2 connections"))
}

pub(super) fn terminal_on_uio(vm: &mut Vm) -> Result<()> {
    terminal(vm, "--uio")
}

pub(super) fn terminal_on_vfio(vm: &mut Vm) -> Result<()> {
    terminal(vm, "--vfio")
}
