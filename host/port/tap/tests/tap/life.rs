//! The interface comes, follows the device, and goes.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_manager::{LoadSpec, Phase, UnloadOptions};
use cofferdam_port_tap::{TapError, TapPort};
use cofferdam_sim::{Drive, Frame, NetProfile, Options, Sim, Transmit};

use crate::bed::{Bed, component, ip, is_gone, link, manager, until};
use crate::peer::{self, FAR};

#[test]
fn the_interface_has_the_devices_address_and_mtu_is_up_and_goes_with_the_port_or_the_binding() {
    let bed = Bed::new(NetProfile { mtu: Some(1280), ..NetProfile::default() });
    bed.serve("lan0");
    let shown = link("lan0");
    assert!(shown.contains("mtu 1280 ") && shown.contains("02:cf:da:00:00:01"), "{shown}");
    assert!(shown.contains(",UP,LOWER_UP"), "{shown}");
    let _ = bed.socket();
    bed.binding.detach_port("tap:lan0").unwrap();
    is_gone("lan0");
    assert_eq!(bed.binding.phase(), Phase::Serving);
    // Again, on the same binding.
    bed.serve("lan1");
    let _ = bed.socket();
    bed.unload();
    is_gone("lan1");
}

#[test]
fn the_carrier_follows_the_devices_link_through_a_storm_of_flaps() {
    let bed = Bed::new(NetProfile::default());
    bed.sim.set_link(false);
    until(
        "the driver knows",
        || matches!(bed.binding.offer().as_deref(), Some(cofferdam_manager::Offer::Net(net)) if !net.link_up),
    );
    bed.serve("lan0");
    assert!(link("lan0").contains("NO-CARRIER"), "{}", link("lan0"));
    bed.sim.set_link(true);
    until("a carrier", || link("lan0").contains("LOWER_UP"));
    for flap in 0..200 {
        bed.sim.set_link(flap % 2 == 1);
    }
    bed.sim.set_link(false);
    until("no carrier", || link("lan0").contains("NO-CARRIER"));
    bed.sim.set_link(true);
    until("a carrier", || link("lan0").contains("LOWER_UP"));
    let _ = bed.socket();
    bed.unload();
}

#[test]
fn an_unload_while_packets_flow_both_ways_is_clean_and_a_new_driver_serves_the_same_name() {
    let bed = Bed::new(NetProfile::default());
    for round in 0..3 {
        let bed = if round == 0 { &bed } else { &bed.again() };
        bed.serve("lan0");
        let socket = bed.socket();
        bed.sim.set_transmit(Transmit::Sink);
        bed.sim.set_generator(Some(&peer::datagram(9, &[7; 1000])));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let _ = socket.send_to(&[1; 1400], (Ipv4Addr::from(FAR), 7));
                }
            });
            let before = bed.sim.net_stats();
            until("traffic", || {
                let now = bed.sim.net_stats();
                now.transmitted > before.transmitted + 500 && now.received > before.received + 500
            });
            bed.unload();
            done.store(true, Ordering::Relaxed);
        });
        is_gone("lan0");
        bed.sim.set_generator(None);
        bed.sim.set_transmit(Transmit::Record);
        bed.sim.sent();
    }
}

#[test]
fn a_name_that_is_taken_and_a_device_that_is_no_network_are_refused() {
    let bed = Bed::new(NetProfile::default());
    ip("tuntap add mode tap vnet_hdr name lan0");
    for name in ["lan0", "lo"] {
        let refused = bed.start(&format!("tap:{name}"));
        assert!(matches!(refused, Err(TapError::InUse(_))), "{refused:?}");
    }
    // The lanes were given back.
    bed.serve("lan1");
    assert!(matches!(bed.start("tap:lan2"), Err(TapError::Open(_))), "two cannot take what arrives");
    bed.unload();
    let disk = Sim::new(Options::default()).unwrap();
    let manager = manager();
    let transport = Box::new(disk.transport(Drive::Threads).unwrap());
    let binding = manager.load(LoadSpec::new("blk", component("virtio-blk.wasm"), transport)).unwrap();
    let refused = TapPort::start(Arc::clone(&binding), &"tap:lan3".parse().unwrap());
    assert!(matches!(refused, Err(TapError::NotNet("block"))), "{refused:?}");
    manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
}

#[test]
fn an_interface_that_is_deleted_or_set_down_does_not_disturb_the_binding() {
    let bed = Bed::new(NetProfile::default());
    bed.serve("lan0");
    let socket = bed.socket();
    let frame = || Frame::plain(&peer::datagram(9, b"into the void"));
    ip("link set lan0 down");
    (0..100).for_each(|_| assert!(bed.sim.inject(frame())));
    until("taken and dropped", || bed.sim.net_stats().waiting == 0);
    ip("link set lan0 up");
    bed.hears(&socket, b"up again");
    ip("link del lan0");
    (0..1000).for_each(|_| assert!(bed.sim.inject(frame())));
    until("taken and dropped", || bed.sim.net_stats().waiting == 0);
    assert_eq!(bed.binding.phase(), Phase::Serving);
    bed.binding.detach_port("tap:lan0").unwrap();
    bed.serve("lan0");
    let _: UdpSocket = bed.socket();
    bed.unload();
}
