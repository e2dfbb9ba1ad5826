//! Two network namespaces with a cable between them, and who sends something through it: ping and iperf3.
//!
//! Namespace `a` has the near end (the card under test, whoever drives it), `b` the far end, which is always the kernel's.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::host::kernel_has_interface;
use crate::pci::NET1;
use crate::program::{Output, Running};
use crate::vm::{SHORT, Vm};

/// The namespaces.
pub const NEAR: &str = "a";
/// See [`NEAR`].
pub const FAR: &str = "b";
/// The address of the near end, and of the far one.
pub const NEAR_ADDRESS: &str = "10.7.0.1";
/// See [`NEAR_ADDRESS`].
pub const FAR_ADDRESS: &str = "10.7.0.2";

/// How much longer than it is told iperf3 may take: it connects, and at the end waits for what is under way.
pub const IPERF_MORE: Duration = Duration::from_secs(60);

/// The namespaces. Dropped, they are gone, and the cards in them are where they were.
#[derive(Debug)]
pub struct Namespaces {
    /// The far end's interface.
    pub far: String,
}

impl Namespaces {
    /// Makes both, and has the far end in its own with an address and `mtu`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(vm: &Vm, mtu: u32) -> Result<Namespaces> {
        // What another scenario left.
        remove();
        let far = kernel_has_interface(vm, &NET1.function()?)?;
        let made = Namespaces { far };
        for name in [NEAR, FAR] {
            vm.run(["ip", "netns", "add", name])?.success()?;
            ip(vm, name, "link set lo up")?;
        }
        made.have(vm, FAR, &made.far, FAR_ADDRESS, mtu)?;
        Ok(made)
    }

    /// Has `interface`, which is in the machine's own namespace, as the near end.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn near(&self, vm: &Vm, interface: &str, mtu: u32) -> Result<()> {
        self.have(vm, NEAR, interface, NEAR_ADDRESS, mtu)
    }

    /// What an operator types. The kernel sets an interface down that changes its namespace, and forgets its addresses.
    fn have(&self, vm: &Vm, namespace: &str, interface: &str, address: &str, mtu: u32) -> Result<()> {
        vm.run(["ip", "link", "set", interface, "netns", namespace])?.success()?;
        // No IPv6: what it says by itself is no traffic of the scenario's.
        inside(vm, namespace, &format!("sysctl -q -w net.ipv6.conf.{interface}.disable_ipv6=1"))?;
        ip(vm, namespace, &format!("address add {address}/24 dev {interface}"))?;
        ip(vm, namespace, &format!("link set {interface} mtu {mtu} up"))?;
        Ok(())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        remove();
    }
}

fn remove() {
    for name in [NEAR, FAR] {
        let _ = Running::start("ip", &["ip", "netns", "delete", name]).and_then(|running| running.finish(SHORT));
    }
}

/// `ip -n NAMESPACE` with these words.
///
/// # Errors
/// When it is refused.
pub fn ip(vm: &Vm, namespace: &str, words: &str) -> Result<Output> {
    let line: Vec<_> = ["ip", "-n", namespace].into_iter().chain(words.split_whitespace()).collect();
    vm.run(line)?.success()
}

/// The words of a program that runs in a namespace.
fn words<'a>(namespace: &'a str, line: &'a str) -> Vec<&'a str> {
    ["ip", "netns", "exec", namespace].into_iter().chain(line.split_whitespace()).collect()
}

/// Runs a program in a namespace.
///
/// # Errors
/// When it fails.
pub fn inside(vm: &Vm, namespace: &str, line: &str) -> Result<Output> {
    vm.run(words(namespace, line))?.success()
}

/// What the kernel says of an interface; nothing if there is none of this name.
///
/// # Errors
/// When it says something else than a list of one.
pub fn link(vm: &Vm, namespace: &str, interface: &str) -> Result<Option<Value>> {
    let output = vm.run(["ip", "-n", namespace, "-j", "link", "show", "dev", interface])?;
    if !output.status.success() {
        ensure!(output.stderr.contains("does not exist"), "ip: {}", output.stderr);
        return Ok(None);
    }
    Ok(Some(output.json()?.get(0).cloned().context("no link")?))
}

/// Whether an interface that is there and up has a carrier.
///
/// # Errors
/// When it is not there or not up.
pub fn has_carrier(vm: &Vm, namespace: &str, interface: &str) -> Result<bool> {
    let link = link(vm, namespace, interface)?.with_context(|| format!("there is no {interface}"))?;
    let has = |flag: &str| link["flags"].as_array().is_some_and(|flags| flags.iter().any(|one| one == flag));
    ensure!(has("UP"), "{interface} is down: {link}");
    ensure!(has("LOWER_UP") != has("NO-CARRIER"), "{link}");
    Ok(has("LOWER_UP"))
}

/// `count` pings of packets of `bytes` bytes that must not be fragmented, with all headers of IP; all are answered.
///
/// # Errors
/// When one is not.
pub fn ping(vm: &Vm, from: &str, to: &str, bytes: u32, count: u32) -> Result<()> {
    // Of IP and ICMP.
    let payload = bytes - 28;
    // With `-w` it goes on until so many were answered; without, it would wait for the last answer no longer than for two others.
    let line = format!("ping -n -M do -i 0.01 -w 20 -s {payload} -c {count} {to}");
    let told = inside(vm, from, &line)?.stdout;
    let mut answered = answered(&told);
    // Where answers are slow, more is sent.
    answered.retain(|number| *number <= count);
    ensure!(answered == (1..=count).collect::<Vec<_>>(), "not all {count} of {bytes} bytes are answered: {told}");
    Ok(())
}

/// Which pings are answered, by the output of ping. In order: the kernel may send what waited for the other's address behind what came later.
fn answered(told: &str) -> Vec<u32> {
    let mut answered: Vec<u32> = told.split("icmp_seq=").skip(1).filter_map(number).collect();
    answered.sort_unstable();
    answered
}

/// Pings that go on until they are stopped, a hundred in a second.
#[derive(Debug)]
pub struct Pings {
    process: Running,
}

impl Pings {
    /// Those that may be under way when they are stopped.
    const UNDER_WAY: usize = 100;

    /// Starts them.
    ///
    /// # Errors
    /// When ping does not start.
    pub fn start(vm: &Vm, from: &str, to: &str) -> Result<Pings> {
        Ok(Pings { process: vm.spawn("ping", words(from, &format!("ping -n -i 0.01 {to}")))? })
    }

    /// Stops them; how many were answered.
    ///
    /// # Errors
    /// When one was not answered, or twice, before the last that was.
    pub fn end(self) -> Result<usize> {
        let told = self.process.interrupt(SHORT)?.stdout;
        let answered = answered(&told);
        let whole = answered.iter().copied().eq(1..=answered.len() as u32);
        ensure!(whole, "not each is answered once: {told}");
        let summary = told.lines().find(|line| line.contains("packets transmitted"));
        let sent = summary.and_then(number).with_context(|| format!("no summary: {told}"))? as usize;
        ensure!(answered.len() + Pings::UNDER_WAY >= sent, "{} of {sent} are answered: {told}", answered.len());
        Ok(answered.len())
    }
}

/// The number that a text begins with.
fn number(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// iperf3's server in the far namespace.
#[derive(Debug)]
pub struct Server {
    _process: Running,
}

impl Server {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(vm: &Vm) -> Result<Server> {
        let mut process = vm.spawn("iperf3-server", words(FAR, "iperf3 -s --forceflush"))?;
        vm.wait_until("iperf3 listens", SHORT, || {
            ensure!(process.is_alive()?, "iperf3 has ended: {}", process.stderr());
            Ok(process.stdout().contains("Server listening"))
        })?;
        Ok(Server { _process: process })
    }

    /// Starts a client in the near namespace that sends (or with `-R` gets) as much as `how` says.
    ///
    /// # Errors
    /// When it does not start.
    pub fn client(&self, vm: &Vm, how: &str) -> Result<Client> {
        let line = format!("iperf3 -c {FAR_ADDRESS} -B {NEAR_ADDRESS} --json {how}");
        Ok(Client { process: vm.spawn("iperf3", words(NEAR, &line))? })
    }

    /// The same for so many seconds, to its end.
    ///
    /// # Errors
    /// When it fails, or nothing came through.
    pub fn run(&self, vm: &Vm, seconds: u32, options: &str) -> Result<Flow> {
        let client = self.client(vm, &format!("-t {seconds} {options}"))?;
        client.end(IPERF_MORE + Duration::from_secs(seconds.into()))
    }
}

/// A client of iperf3 that runs.
#[derive(Debug)]
pub struct Client {
    /// The process.
    pub process: Running,
}

impl Client {
    /// Waits for its end, up to `limit`; what came of it.
    ///
    /// # Errors
    /// When it failed, or nothing came through.
    pub fn end(self, limit: Duration) -> Result<Flow> {
        let output = self.process.finish(limit)?;
        let told = output.json()?;
        if let Some(error) = told.get("error") {
            bail!("iperf3: {error}");
        }
        output.success()?;
        Flow::of(told)
    }
}

/// What iperf3 measured of one flow, at the end that received.
#[derive(Debug)]
pub struct Flow {
    /// Bits per second.
    pub bits: f64,
    /// Packets per second that came, of UDP.
    pub packets: f64,
    /// Lost packets in a hundred, of UDP.
    pub lost_percent: f64,
    /// Segments that TCP sent again.
    pub retransmits: u64,
    /// Bits per second of each second, at the end that was asked.
    pub each_second: Vec<f64>,
    /// The local port of the connection.
    pub port: u64,
}

impl Flow {
    fn of(told: Value) -> Result<Flow> {
        let end = &told["end"];
        // Of UDP, `sum` has what the sender sent and how much of it the receiver missed.
        let (bits, packets, lost_percent) = match end["sum_received"]["packets"].as_f64() {
            None => (end["sum_received"]["bits_per_second"].as_f64(), 0.0, 0.0),
            Some(_) => {
                let sum = &end["sum"];
                let of = |name: &str| sum[name].as_f64().with_context(|| format!("no {name}: {sum}"));
                let came = of("packets")? - of("lost_packets")?;
                let packets = came / of("seconds")?;
                (Some(of("bits_per_second")? * came / of("packets")?.max(1.0)), packets, of("lost_percent")?)
            }
        };
        let bits = bits.with_context(|| format!("no rate: {end}"))?;
        ensure!(bits > 0.0, "nothing came through: {end}");
        let seconds = told["intervals"].as_array().context("no intervals")?;
        Ok(Flow {
            bits,
            packets,
            lost_percent,
            retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or_default(),
            each_second: seconds.iter().filter_map(|second| second["sum"]["bits_per_second"].as_f64()).collect(),
            port: told["start"]["connected"][0]["local_port"].as_u64().context("no port")?,
        })
    }

    /// Megabits per second.
    #[must_use]
    pub fn megabits(&self) -> f64 {
        self.bits / 1e6
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(end: Value) -> Value {
        let seconds = [8e6, 0.0].map(|bits| json!({ "sum": { "bits_per_second": bits } }));
        json!({ "start": { "connected": [{ "local_port": 40_455 }] }, "intervals": seconds, "end": end })
    }

    #[test]
    fn what_the_receiver_has_counts() {
        let tcp = json!({ "sum_sent": { "bits_per_second": 9e6, "retransmits": 3 }, "sum_received": { "bits_per_second": 8e6 } });
        let flow = Flow::of(told(tcp)).unwrap();
        assert_eq!((flow.megabits(), flow.retransmits, flow.port), (8.0, 3, 40_455));
        assert_eq!(flow.each_second, [8e6, 0.0]);
        let sum = json!({ "bits_per_second": 10e6, "packets": 1000, "lost_packets": 250, "lost_percent": 25.0, "seconds": 2.0 });
        let udp = json!({ "sum": sum, "sum_received": { "packets": 1000, "bits_per_second": 1.0 } });
        let flow = Flow::of(told(udp)).unwrap();
        assert_eq!((flow.megabits(), flow.packets, flow.lost_percent), (7.5, 375.0, 25.0));
    }

    #[test]
    fn a_flow_of_nothing_is_an_error() {
        assert!(Flow::of(told(json!({ "sum_received": { "bits_per_second": 0.0 } }))).is_err());
        assert!(Flow::of(told(json!({}))).is_err());
    }
}
