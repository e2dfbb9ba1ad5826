//! The documents of wit/.

use crate::workspace;
use wit_parser::{Docs, Resolve, TypeDefKind};

fn note(missing: &mut Vec<String>, docs: &Docs, name: String) {
    if docs.contents.as_ref().is_none_or(|text| text.trim().is_empty()) {
        missing.push(name);
    }
}

/// Cases of an enum may speak for themselves; a field or a case that carries something may not.
fn parts(missing: &mut Vec<String>, kind: &TypeDefKind, name: &str) {
    match kind {
        TypeDefKind::Record(record) => {
            record.fields.iter().for_each(|field| note(missing, &field.docs, format!("{name}.{}", field.name)));
        }
        TypeDefKind::Variant(variant) => {
            variant.cases.iter().for_each(|case| note(missing, &case.docs, format!("{name}.{}", case.name)));
        }
        TypeDefKind::Flags(flags) => {
            flags.flags.iter().for_each(|flag| note(missing, &flag.docs, format!("{name}.{}", flag.name)));
        }
        _ => {}
    }
}

#[test]
fn every_item_in_wit_is_documented() {
    let mut resolve = Resolve::default();
    let (own, _) = resolve.push_dir(workspace::root().join("wit")).expect("wit/ parses");
    let mut missing = Vec::new();
    note(&mut missing, &resolve.packages[own].docs, "the package".to_owned());
    for (name, interface) in &resolve.packages[own].interfaces {
        let interface = &resolve.interfaces[*interface];
        note(&mut missing, &interface.docs, name.clone());
        for (function, item) in &interface.functions {
            note(&mut missing, &item.docs, format!("{name}.{function}"));
        }
        for (type_name, item) in &interface.types {
            let item = &resolve.types[*item];
            // What comes by `use` is documented where it is defined.
            if !matches!(item.kind, TypeDefKind::Type(wit_parser::Type::Id(_))) {
                note(&mut missing, &item.docs, format!("{name}.{type_name}"));
                parts(&mut missing, &item.kind, &format!("{name}.{type_name}"));
            }
        }
    }
    for (name, world) in &resolve.packages[own].worlds {
        note(&mut missing, &resolve.worlds[*world].docs, name.clone());
    }
    assert!(missing.is_empty(), "no documents on: {missing:#?}");
}
