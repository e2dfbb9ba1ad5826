//! The scenarios, and the machine that each needs.

mod bed;
mod bypass;
mod commands;
mod conformance;
mod console;
mod crash;
mod drives;
mod entropy;
mod finds;
mod hostile;
mod kernel_client;
mod load;
mod net;
mod net_removal;
mod net_traffic;
mod pair;
mod removal;
mod resizes;
mod returns;
mod takeover;
mod takeover_ports;

use crate::vm::Vm;
use anyhow::Result;

/// Something that must hold, and the script that shows it.
pub struct Scenario {
    /// The claim, with underscores.
    pub name: &'static str,
    /// The machine it runs in.
    pub topology: &'static str,
    /// Whether only `--long` runs it.
    pub long: bool,
    /// Parts of those lines of the kernel's log that would otherwise fail it.
    pub expected: &'static [&'static str],
    /// What is done.
    pub script: fn(&mut Vm) -> Result<()>,
}

impl Scenario {
    const fn new(topology: &'static str, name: &'static str, script: fn(&mut Vm) -> Result<()>) -> Scenario {
        Scenario { name, topology, long: false, expected: &[], script }
    }

    /// The same, but only with `--long`.
    pub const fn long(self) -> Scenario {
        Scenario { long: true, ..self }
    }

    /// The same, causing lines in the kernel's log that hold one of these parts.
    pub const fn expecting(self, expected: &'static [&'static str]) -> Scenario {
        Scenario { expected, ..self }
    }
}

/// All of them, in the order in which they run.
pub fn all() -> &'static [Scenario] {
    const ALL: &[Scenario] = &[
        Scenario::new("uio", "uio_boots_and_sees_its_devices", bed::boots),
        Scenario::new("uio", "uio_takes_a_disk_and_gives_it_back", bed::uio_takes_a_disk),
        Scenario::new("uio", "uio_disk_is_unplugged_and_plugged_again", bed::unplugs),
        Scenario::new("uio", "a_driver_component_is_loaded_from_the_cache", bed::inspects),
        Scenario::new("uio", "uio_disk_is_driven_and_given_back", drives::on_uio),
        Scenario::new("uio", "a_transitional_device_is_refused_and_given_back", drives::legacy_is_refused),
        Scenario::new("uio", "a_driver_with_addresses_is_refused_on_uio", drives::edu_on_uio),
        Scenario::new("uio", "a_guessed_address_leads_nowhere_on_uio", drives::a_guess_on_uio),
        Scenario::new("uio", "a_load_that_names_no_driver_finds_it_by_the_devices_id", finds::by_id),
        Scenario::new("uio", "uio_disk_that_is_resized_is_served_in_its_new_size", resizes::on_uio),
        Scenario::new("uio", "uio_passes_the_conformance_suite", conformance::disks_on_uio),
        Scenario::new("uio", "uio_passes_the_conformance_suite_of_networks", conformance::network_on_uio),
        Scenario::new("uio", "uio_passes_the_conformance_suite_of_consoles", conformance::console_on_uio),
        Scenario::new("uio", "uio_passes_the_conformance_suite_of_entropy", conformance::entropy_on_uio),
        Scenario::new("uio", "uio_host_is_killed_in_mid_traffic", crash::on_uio),
        Scenario::new("uio", "uio_disk_of_a_killed_host_is_loaded_again", crash::loaded_again_on_uio),
        Scenario::new("uio", "uio_disk_is_mounted_by_the_kernels_nbd_client", kernel_client::on_uio),
        Scenario::new("uio", "uio_devices_are_bound_and_given_back_by_hand", commands::by_hand),
        Scenario::new("uio", "uio_disk_in_use_is_refused", commands::in_use),
        Scenario::new("uio", "uio_doctor_tells_what_this_machine_has", commands::doctor),
        Scenario::new("uio", "uio_hostile_driver_is_refused_every_bound", hostile::some),
        Scenario::new("uio", "uio_other_hostile_drivers_are_refused_every_bound", hostile::others).long(),
        Scenario::new("uio", "uio_disk_leaves_and_another_stays_in_one_host", pair::one_goes),
        Scenario::new("uio", "uio_disk_serves_two_queues", load::two_queues_on_uio),
        Scenario::new("uio", "uio_disk_is_unloaded_under_load", load::unloaded_on_uio),
        Scenario::new("uio", "uio_disk_is_unplugged_under_load", removal::unplugged_on_uio),
        Scenario::new("uio", "uio_disk_is_plugged_in_again_and_its_clients_go_on", returns::on_uio),
        Scenario::new("uio", "uio_disk_is_served_by_one_daemon_after_the_other", takeover::on_uio),
        Scenario::new("uio", "uio_disk_stays_with_its_daemon_when_new_ones_fail", takeover::fails_on_uio),
        Scenario::new(
            "uio",
            "uio_disk_stays_with_its_daemon_wherever_new_ones_fail",
            takeover::fails_everywhere_on_uio,
        )
        .long(),
        Scenario::new("uio", "uio_random_bytes_come_from_a_daemon_that_took_over", takeover::entropy),
        Scenario::new("uio", "uio_disk_is_plugged_in_again_under_a_new_daemon", takeover::returns_on_uio),
        Scenario::new("uio", "uio_disk_loses_its_slot_power_under_load", removal::powered_off_on_uio),
        Scenario::new("uio", "uio_console_is_a_login_until_the_unload_hangs_up", console::login_on_uio),
        Scenario::new("uio", "uio_console_passes_10_mib_both_ways_at_once", console::paste_on_uio),
        Scenario::new("uio", "uio_console_holds_a_flood_back_and_is_unloaded_in_it", console::flood_on_uio),
        Scenario::new("uio", "uio_console_is_served_by_one_daemon_after_the_other", takeover_ports::terminal_on_uio),
        Scenario::new("uio", "uio_random_bytes_come_from_a_fifo_and_go_to_the_pool_when_asked", entropy::on_uio),
        Scenario::new("uio", "uio_network_card_has_a_tap_interface_and_is_given_back", net::pings),
        Scenario::new("uio", "uio_network_card_carries_packets_of_full_size", net::full_sizes),
        Scenario::new("uio", "uio_network_card_is_reloaded_under_iperf3", net::reloads),
        Scenario::new("uio", "uio_network_card_loses_its_link_and_has_it_again", net::link_flaps),
        Scenario::new("uio", "uio_network_card_is_served_by_one_daemon_after_the_other", takeover_ports::network),
        Scenario::new("uio", "uio_network_card_is_unplugged_under_pings", net_removal::unplugged),
        Scenario::new("uio", "uio_network_card_carries_iperf3_for_ten_seconds", net_traffic::ten_seconds),
        Scenario::new("uio", "uio_network_card_carries_iperf3_for_a_minute", net_traffic::a_minute).long(),
        Scenario::new("uio", "uio_network_card_beside_the_kernels_driver", net_traffic::beside_the_kernel).long(),
        Scenario::new("vfio", "vfio_boots_and_sees_its_devices", bed::boots),
        Scenario::new("vfio", "vfio_takes_a_disk_and_gives_it_back", bed::vfio_takes_a_disk),
        Scenario::new("vfio", "vfio_disk_is_unplugged_and_plugged_again", bed::unplugs),
        Scenario::new("vfio", "vfio_disk_is_driven_and_given_back", drives::on_vfio),
        Scenario::new("vfio", "a_driver_with_addresses_is_served_on_vfio", drives::edu_on_vfio),
        Scenario::new("vfio", "a_dma_beside_its_memory_faults_on_vfio", drives::a_stray_on_vfio).expecting(&["DMAR"]),
        Scenario::new("vfio", "vfio_disk_that_is_resized_is_served_in_its_new_size", resizes::on_vfio),
        Scenario::new("vfio", "vfio_passes_the_conformance_suite", conformance::disks_on_vfio),
        Scenario::new("vfio", "vfio_passes_the_conformance_suite_of_networks", conformance::network_on_vfio),
        Scenario::new("vfio", "vfio_passes_the_conformance_suite_of_consoles", conformance::console_on_vfio),
        Scenario::new("vfio", "vfio_passes_the_conformance_suite_of_entropy", conformance::entropy_on_vfio),
        Scenario::new("vfio", "vfio_host_is_killed_in_mid_traffic", crash::on_vfio),
        Scenario::new(
            "vfio",
            "vfio_disk_of_a_killed_host_is_loaded_again_round_the_iommu",
            crash::loaded_again_round_the_iommu,
        ),
        Scenario::new("vfio", "vfio_disk_is_mounted_by_the_kernels_nbd_client", kernel_client::on_vfio),
        Scenario::new("vfio", "a_device_round_the_iommu_is_confined_by_the_host", bypass::confined_by_the_host),
        Scenario::new("vfio", "vfio_devices_are_bound_and_given_back_by_hand", commands::by_hand),
        Scenario::new("vfio", "vfio_disk_in_use_is_refused", commands::in_use),
        Scenario::new("vfio", "vfio_doctor_tells_what_this_machine_has", commands::doctor),
        Scenario::new("vfio", "vfio_hostile_driver_is_refused_every_bound", hostile::some),
        Scenario::new("vfio", "vfio_other_hostile_drivers_are_refused_every_bound", hostile::others).long(),
        Scenario::new("vfio", "vfio_disk_leaves_and_another_stays_in_one_host", pair::one_goes),
        Scenario::new("vfio", "vfio_disk_serves_two_queues", load::two_queues_on_vfio),
        Scenario::new("vfio", "vfio_disk_is_unloaded_under_load", load::unloaded_on_vfio),
        Scenario::new("vfio", "vfio_disk_is_unplugged_under_load", removal::unplugged_on_vfio),
        Scenario::new("vfio", "vfio_disk_is_plugged_in_again_and_its_clients_go_on", returns::on_vfio),
        Scenario::new("vfio", "vfio_disk_is_served_by_one_daemon_after_the_other", takeover::on_vfio),
        Scenario::new("vfio", "vfio_disk_stays_with_its_daemon_when_new_ones_fail", takeover::fails_on_vfio),
        Scenario::new(
            "vfio",
            "vfio_disk_stays_with_its_daemon_wherever_new_ones_fail",
            takeover::fails_everywhere_on_vfio,
        )
        .long(),
        Scenario::new("vfio", "vfio_disk_is_plugged_in_again_under_a_new_daemon", takeover::returns_on_vfio),
        Scenario::new("vfio", "a_disk_round_the_iommu_is_served_by_daemons_in_a_row", takeover::round_the_iommu),
        Scenario::new("vfio", "vfio_disk_loses_its_slot_power_under_load", removal::powered_off_on_vfio).long(),
        Scenario::new("vfio", "vfio_console_is_a_login_until_the_unload_hangs_up", console::login_on_vfio),
        Scenario::new("vfio", "vfio_console_passes_10_mib_both_ways_at_once", console::paste_on_vfio),
        Scenario::new("vfio", "vfio_console_holds_a_flood_back_and_is_unloaded_in_it", console::flood_on_vfio),
        Scenario::new("vfio", "vfio_console_is_served_by_one_daemon_after_the_other", takeover_ports::terminal_on_vfio),
        Scenario::new("vfio", "vfio_random_bytes_come_from_a_fifo_and_go_to_the_pool_when_asked", entropy::on_vfio),
        Scenario::new("vfio", "vfio_network_card_has_a_tap_interface_and_is_given_back", net::pings),
        Scenario::new("vfio", "vfio_network_card_carries_packets_of_full_size", net::full_sizes),
        Scenario::new("vfio", "vfio_network_card_is_reloaded_under_iperf3", net::reloads),
        Scenario::new("vfio", "vfio_network_card_loses_its_link_and_has_it_again", net::link_flaps),
        Scenario::new("vfio", "vfio_network_card_is_served_by_one_daemon_after_the_other", takeover_ports::network),
        Scenario::new("vfio", "vfio_network_card_is_unplugged_under_pings", net_removal::unplugged),
        Scenario::new("vfio", "vfio_network_card_carries_iperf3_for_ten_seconds", net_traffic::ten_seconds),
        Scenario::new("vfio", "vfio_network_card_carries_iperf3_for_a_minute", net_traffic::a_minute).long(),
        Scenario::new("vfio", "vfio_network_card_beside_the_kernels_driver", net_traffic::beside_the_kernel).long(),
    ];
    ALL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_one_word_and_used_once() {
        let mut names: Vec<_> = all().iter().map(|scenario| scenario.name).collect();
        assert!(names.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')));
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_topology_has_devices() {
        assert!(all().iter().all(|scenario| !crate::pci::places(scenario.topology).is_empty()));
    }
}
