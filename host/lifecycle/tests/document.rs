//! `docs/LIFECYCLE.md` is what the table says.

use std::path::Path;

#[test]
fn the_document_is_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/LIFECYCLE.md");
    let expected = cofferdam_lifecycle::document();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &expected).expect("docs can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "docs/LIFECYCLE.md is not what the table says; UPDATE_SNAPSHOTS=1 writes it anew");
}
