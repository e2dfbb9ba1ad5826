//! iperf3 through a TAP interface, and beside what the kernel's own driver makes of the same card.

use std::path::Path;

use anyhow::{Result, ensure};

use super::net::{Scene, TAP};
use crate::host::kernel_has_interface;
use crate::network::{Flow, NEAR, Namespaces, Server, inside};
use crate::pci::NET0;
use crate::vm::Vm;

/// What of UDP is sent: an emulated machine carries it with room to spare, in packets of the full size. The receiver's buffer holds two seconds of it, for a processor that stands
/// still meanwhile; the default one holds a quarter of a second.
const UDP: &str = "-u -b 4M -l 1472 -w 2M";

/// Largest buffer of a socket that a program may ask for, in bytes.
const MAX_BUFFER_BYTES: u32 = 4 << 20;

/// Most packets of such a rate that may be lost, in a hundred: a network may lose packets, and a machine that others keep busy does.
const LOST_PERCENT: f64 = 25.0;

/// TCP and UDP in both directions, for so many seconds each.
fn carries(vm: &Vm, seconds: u32) -> Result<()> {
    for limit in ["rmem_max", "wmem_max"] {
        std::fs::write(Path::new("/proc/sys/net/core").join(limit), MAX_BUFFER_BYTES.to_string())?;
    }
    let scene = Scene::set(vm, 1500)?;
    let server = Server::start(vm)?;
    for (what, options) in [("out", ""), ("in", "-R")] {
        let flow = server.run(vm, seconds, options)?;
        vm.step(&format!("TCP {what}: {:.0} Mbit/s, {} segments sent again", flow.megabits(), flow.retransmits));
        // Many seconds without a byte would be a lane that nobody woke; one or two are a machine that others keep busy.
        let silent = flow.each_second.iter().filter(|bits| **bits == 0.0).count();
        ensure!(silent <= 2, "{silent} seconds of silence: {:?}", flow.each_second);
        let flow = server.run(vm, seconds, &format!("{UDP} {options}"))?;
        vm.step(&format!("UDP {what}: {:.1} Mbit/s, {:.2} % lost", flow.megabits(), flow.lost_percent));
        ensure!(flow.lost_percent <= LOST_PERCENT, "too much is lost: {flow:?}");
    }
    drop(server);
    // What the interface calls an error is a packet that was not one.
    for count in ["rx_errors", "tx_errors"] {
        let text = inside(vm, NEAR, &format!("cat /sys/class/net/{TAP}/statistics/{count}"))?.stdout;
        ensure!(text.trim() == "0", "{count}: {text}");
    }
    scene.unload(vm)?;
    vm.step(scene.host.process.stderr().lines().rfind(|line| line.contains("interface down")).unwrap_or("no counts"));
    scene.host.end()
}

pub(super) fn ten_seconds(vm: &mut Vm) -> Result<()> {
    carries(vm, 10)
}

pub(super) fn a_minute(vm: &mut Vm) -> Result<()> {
    carries(vm, 60)
}

/// How often each is measured, in turn, and for how many seconds.
const ROUNDS: usize = 5;
const SECONDS: u32 = 4;

/// What is measured: a name, its options, and what of the flow counts.
struct Measure {
    name: &'static str,
    options: &'static str,
    of: fn(&Flow) -> f64,
}

/// The smallest packets that iperf3 sends have 16 bytes, which with all headers makes a frame of 62; as many as there is room for.
const MEASURES: [Measure; 4] = [
    Measure { name: "TCP out, Mbit/s", options: "", of: Flow::megabits },
    Measure { name: "TCP in, Mbit/s", options: "-R", of: Flow::megabits },
    Measure { name: "frames of 64 bytes out, packets/s", options: "-u -b 0 -l 18", of: |flow| flow.packets },
    Measure { name: "frames of 64 bytes in, packets/s", options: "-u -b 0 -l 18 -R", of: |flow| flow.packets },
];

fn measure(vm: &Vm, who: &str, into: &mut [Vec<f64>; 4]) -> Result<()> {
    let server = Server::start(vm)?;
    for (measure, into) in MEASURES.iter().zip(into) {
        let flow = server.run(vm, SECONDS, measure.options)?;
        let (lost, again) = (flow.lost_percent, flow.retransmits);
        let value = (measure.of)(&flow);
        vm.step(&format!("{who}: {}: {value:.0}, {lost:.1} % lost, {again} segments sent again", measure.name));
        into.push(value);
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The TAP interface and the kernel's own driver on the same card, in turn, with Ethernet's MTU. What is claimed is that both carry all of it; the figures are for the note.
pub(super) fn beside_the_kernel(vm: &mut Vm) -> Result<()> {
    let (mut kernel, mut ours) = ([const { Vec::new() }; 4], [const { Vec::new() }; 4]);
    for round in 1..=ROUNDS {
        {
            let card = NET0.function()?;
            let own = kernel_has_interface(vm, &card)?;
            let namespaces = Namespaces::new(vm, 1500)?;
            namespaces.near(vm, &own, 1500)?;
            measure(vm, "kernel", &mut kernel)?;
        }
        let scene = Scene::set(vm, 1500)?;
        measure(vm, "ours", &mut ours)?;
        scene.end(vm)?;
        vm.step(&format!("round {round} of {ROUNDS}"));
    }
    let topology = vm.topology.clone();
    for ((measure, kernel), ours) in MEASURES.iter().zip(&mut kernel).zip(&mut ours) {
        let (theirs, our) = (median(kernel), median(ours));
        let shown = |values: &[f64]| values.iter().map(|value| format!("{value:.0}")).collect::<Vec<_>>().join(" ");
        vm.step(&format!(
            "tap ratio, {topology}, {}: {our:.0} against the kernel's {theirs:.0}: {:.2} (ours {}; kernel's {})",
            measure.name,
            our / theirs,
            shown(ours),
            shown(kernel)
        ));
    }
    Ok(())
}
