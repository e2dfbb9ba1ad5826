//! What is not a driver for this host is refused before anything of it runs, and the message says what to do.

mod support;

use cofferdam_runtime::{Grants, ImportKind, InstantiateError, LoadError, Service};
use support::{Guest, component_of, module, runtime, spec};

#[test]
fn a_file_that_is_not_wasm_is_named_so() {
    let error = runtime().load(b"#!/bin/sh\n").unwrap_err();
    assert_eq!(error, LoadError::NotWasm);
}

#[test]
fn a_core_module_is_refused_with_advice() {
    let core = wat::parse_str(Guest::default().core()).unwrap();
    let error = runtime().load(&core).unwrap_err();
    assert_eq!(error, LoadError::CoreModule);
    assert!(error.to_string().contains("component new"), "{error}");
}

#[test]
fn a_cut_component_is_a_compile_error() {
    let component = Guest::default().component();
    for cut in [8, 9, 100, component.len() - 1] {
        let error = runtime().load(&component[..cut]).unwrap_err();
        // Eight bytes are a whole, empty component.
        let expected =
            matches!(error, LoadError::Compile(_)) || (cut == 8 && matches!(error, LoadError::NotADriver { .. }));
        assert!(expected, "{cut}: {error}");
    }
}

#[test]
fn a_component_of_another_world_is_refused_and_its_exports_are_named() {
    let wit = "package other:thing@1.0.0; interface greet { hello: func(); } world other { export greet; }";
    let core = r#"(module (func (export "other:thing/greet@1.0.0#hello")))"#;
    let error = runtime().load(&component_of(wit, core)).unwrap_err();
    let LoadError::NotADriver { missing, exports } = &error else { panic!("{error}") };
    assert_eq!(missing, "cofferdam:driver/driver@0.1.0");
    assert_eq!(exports, &["other:thing/greet@1.0.0"]);
}

#[test]
fn half_a_driver_is_not_a_driver() {
    let wit = "package cofferdam:driver@0.1.0; interface driver { x: func(); } world other { export driver; }";
    let core = r#"(module (func (export "cofferdam:driver/driver@0.1.0#x")))"#;
    let error = runtime().load(&component_of(wit, core)).unwrap_err();
    assert!(
        matches!(&error, LoadError::NotADriver { missing, .. } if missing == "cofferdam:driver/block@0.1.0"),
        "{error}"
    );
}

#[test]
fn a_driver_of_another_version_is_told_both_versions() {
    let wit = "package cofferdam:driver@0.2.0; interface driver { x: func(); } interface block { y: func(); }
               world other { export driver; export block; }";
    let core = r#"(module (func (export "cofferdam:driver/driver@0.2.0#x")) (func (export "cofferdam:driver/block@0.2.0#y")))"#;
    let error = runtime().load(&component_of(wit, core)).unwrap_err();
    let found = "cofferdam:driver/driver@0.2.0".to_owned();
    assert_eq!(error, LoadError::WrongVersion { found, wanted: "cofferdam:driver/driver@0.1.0".into() });
}

#[test]
fn right_names_with_wrong_types_are_refused_at_instantiation() {
    let wit =
        "package cofferdam:driver@0.1.0; interface driver { attach: func(); config-changed: func(); start: func(); suspend: func(); resume: func(); }
               interface block { get-properties: func(); window: func(); submit: func(); complete: func(); }
               world other { export driver; export block; }";
    let names = [
        "driver@0.1.0#attach",
        "driver@0.1.0#config-changed",
        "driver@0.1.0#start",
        "driver@0.1.0#suspend",
        "driver@0.1.0#resume",
        "block@0.1.0#get-properties",
        "block@0.1.0#window",
        "block@0.1.0#submit",
        "block@0.1.0#complete",
    ];
    let functions: String = names.map(|n| format!(r#"(func (export "cofferdam:driver/{n}"))"#)).concat();
    let module = runtime().load(&component_of(wit, &format!("(module {functions})"))).unwrap();
    let error = module.instantiate(spec()).unwrap_err();
    assert!(matches!(error, InstantiateError::Load(LoadError::Mismatch(_))), "{error}");
}

#[test]
fn a_driver_is_described_without_running_it() {
    let runtime = runtime();
    // It would trap at once if anything of it ran.
    let module = module(&runtime, &Guest { start_function: "unreachable".into(), ..Guest::default() });
    let info = module.info();
    assert_eq!(info.service, Service::Block);
    assert_eq!(info.digest.len(), 64);
    assert!(!info.from_cache);
    let names: Vec<&str> = info.imports.iter().map(|i| i.name.as_str()).collect();
    assert!(
        names.contains(&"cofferdam:driver/log@0.1.0") && names.contains(&"cofferdam:driver/virtio@0.1.0"),
        "{names:?}"
    );
    assert!(info.imports.iter().all(|i| i.kind == ImportKind::Capability));
    assert!(info.exports.contains(&"cofferdam:driver/block@0.1.0".to_owned()));
    module.check_grants(&Grants::default()).unwrap();
}

fn importing(package: &str, interface: &str, function: &str) -> Guest {
    let (name, version) = package.split_once('@').unwrap();
    Guest {
        world: format!(
            "package {package} {{ interface {interface} {{ {function}: func() -> u64; }} }} world wide {{ THE-DRIVER import {name}/{interface}@{version}; }}"
        ),
        imports: format!(r#"(import "{name}/{interface}@{version}" "{function}" (func (result i64)))"#),
        ..Guest::default()
    }
}

#[test]
fn an_import_that_was_not_granted_is_named_with_the_option_that_grants_it() {
    let runtime = runtime();
    let cases = [
        ("wasi:clocks@0.2.6", "monotonic-clock", "--allow wasi:clocks"),
        ("wasi:random@0.2.6", "insecure", "--allow wasi:random"),
        ("wasi:cli@0.2.6", "stdout", "--allow wasi:cli"),
        ("wasi:filesystem@0.2.6", "preopens", "--allow wasi:filesystem=DIR"),
        ("wasi:io@0.2.6", "poll", "--allow wasi:cli"),
    ];
    for (package, interface, option) in cases {
        let module = module(&runtime, &importing(package, interface, "now"));
        let text = module.check_grants(&Grants::default()).unwrap_err().to_string();
        let (name, version) = package.split_once('@').unwrap();
        assert!(text.contains(&format!("{name}/{interface}@{version}")) && text.contains(option), "{text}");
        let error = module.instantiate(spec()).unwrap_err();
        assert!(matches!(error, InstantiateError::Load(LoadError::ImportNotGranted { .. })), "{error}");
    }
}

#[test]
fn an_import_that_nobody_can_give_is_named() {
    let runtime = runtime();
    for package in ["wasi:sockets@0.2.6", "someone:else@3.0.0"] {
        let module = module(&runtime, &importing(package, "things", "get"));
        let error = module.check_grants(&Grants::default()).unwrap_err();
        let (name, _) = package.split_once('@').unwrap();
        assert!(matches!(&error, LoadError::UnknownImport { import } if import.starts_with(name)), "{error}");
    }
}

#[test]
fn a_granted_clock_can_be_read_and_a_grant_gives_nothing_else() {
    let runtime = runtime();
    let mut guest = importing("wasi:clocks@0.2.6", "monotonic-clock", "now");
    guest.imports = guest.imports.replace("(func (result", "(func $now (result");
    guest.start_function = "(if (i64.eqz (call $now)) (then unreachable))".into();
    let module = module(&runtime, &guest);
    let with = |grant: &str| {
        let mut spec = spec();
        spec.grants = Grants::parse(grant).unwrap();
        module.instantiate(spec)
    };
    with("wasi:clocks").unwrap();
    assert!(matches!(with("wasi:random").unwrap_err(), InstantiateError::Load(LoadError::ImportNotGranted { .. })));
}
