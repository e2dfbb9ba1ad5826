//! `cargo xtask licences`: every dependency's licence and version against `deny.toml`.
//!
//! Advisories are not looked at: that needs a database from elsewhere, while this check has to run wherever the tests run.

use crate::metadata::{Metadata, Package};
use crate::policy::{Licences, MultipleVersions, Policy};
use crate::workspace;
use anyhow::{Context, Result, bail};
use spdx::{Expression, LicenseReq, Licensee};
use std::collections::BTreeMap;

/// Prints the table of licences and fails if anything breaks the policy.
pub(crate) fn run() -> Result<()> {
    let policy = Policy::read(&workspace::root().join("deny.toml"))?;
    let metadata = Metadata::read(&policy.graph.targets)?;
    let foreign: Vec<&Package> = metadata.packages.iter().filter(|package| !metadata.is_member(package)).collect();

    print_table(&foreign);
    let mut breaches = licence_breaches(&policy.licenses, &metadata.packages)?;
    breaches.extend(ban_breaches(&policy, &foreign));
    for breach in &breaches {
        println!("BREACH  {breach}");
    }
    if !breaches.is_empty() {
        bail!("{} breaches of deny.toml", breaches.len());
    }
    println!("{} packages keep to deny.toml", metadata.packages.len());
    Ok(())
}

fn print_table(packages: &[&Package]) {
    let mut by_licence = BTreeMap::<&str, Vec<&str>>::new();
    for package in packages {
        by_licence.entry(package.license.as_deref().unwrap_or("(none)")).or_default().push(&package.name);
    }
    let mut rows: Vec<_> = by_licence.into_iter().collect();
    rows.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
    for (licence, mut names) in rows {
        names.sort_unstable();
        names.dedup();
        let shown = names.iter().take(6).copied().collect::<Vec<_>>().join(", ");
        let rest = if names.len() > 6 { ", ..." } else { "" };
        println!("{:>4}  {licence:<58} {shown}{rest}", names.len());
    }
}

fn licence_breaches(policy: &Licences, packages: &[Package]) -> Result<Vec<String>> {
    let allowed = licensees(&policy.allow)?;
    let mut used = vec![false; policy.exceptions.len()];
    let mut breaches = Vec::new();
    for package in packages {
        let mut allowed = allowed.clone();
        for (exception, used) in policy.exceptions.iter().zip(&mut used) {
            if exception.name == package.name {
                allowed.extend(licensees(&exception.allow)?);
                *used = true;
            }
        }
        if let Err(why) = judge(package, &allowed) {
            breaches.push(format!("{} {}: {why}", package.name, package.version));
        }
    }
    for (exception, used) in policy.exceptions.iter().zip(used) {
        if !used {
            breaches.push(format!("the exception for {} matches no package: take it out", exception.name));
        }
    }
    Ok(breaches)
}

fn licensees(names: &[String]) -> Result<Vec<Licensee>> {
    names
        .iter()
        .map(|name| Licensee::parse(name).with_context(|| format!("deny.toml: {name:?} is no SPDX licence")))
        .collect()
}

fn judge(package: &Package, allowed: &[Licensee]) -> Result<(), String> {
    let Some(text) = &package.license else {
        return Err(match &package.license_file {
            Some(file) => format!("has a licence file of its own ({}) and no SPDX expression", file.display()),
            None => "states no licence".to_owned(),
        });
    };
    // Lax: old packages write "MIT/Apache-2.0".
    let expression =
        Expression::parse_mode(text, spdx::ParseMode::LAX).map_err(|error| format!("{text:?}: {error}"))?;
    let satisfied = |licence: &LicenseReq| allowed.iter().any(|one| one.satisfies(licence));
    if expression.evaluate(satisfied) { Ok(()) } else { Err(format!("{text} is not allowed")) }
}

fn ban_breaches(policy: &Policy, packages: &[&Package]) -> Vec<String> {
    let bans = &policy.bans;
    let mut breaches = Vec::new();
    for package in packages {
        for ban in bans.deny.iter().filter(|ban| ban.names(&package.name, &package.version)) {
            breaches.push(format!("{} {} is banned: {}", package.name, package.version, ban.reason));
        }
    }

    let mut versions = BTreeMap::<&str, Vec<&str>>::new();
    for package in packages {
        let skipped = bans.skip.iter().any(|skip| skip.names(&package.name, &package.version));
        if !skipped {
            versions.entry(&package.name).or_default().push(&package.version);
        }
    }
    for (name, versions) in versions.into_iter().filter(|(_, versions)| versions.len() > 1) {
        let finding = format!("{name} is there in {} versions: {}", versions.len(), versions.join(", "));
        match bans.multiple_versions {
            MultipleVersions::Deny => breaches.push(finding),
            MultipleVersions::Warn => println!("twice   {finding}"),
            MultipleVersions::Allow => {}
        }
    }
    for skip in &bans.skip {
        if !packages.iter().any(|package| skip.names(&package.name, &package.version)) {
            breaches.push(format!("skip of {} ({}) matches no package: take it out", skip.spec, skip.reason));
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, license: Option<&str>) -> Package {
        Package {
            id: format!("{name}@{version}"),
            name: name.into(),
            version: version.into(),
            license: license.map(Into::into),
            license_file: None,
            dependencies: Vec::new(),
        }
    }

    fn policy(allow: &[&str]) -> Licences {
        Licences { allow: allow.iter().map(ToString::to_string).collect(), exceptions: Vec::new() }
    }

    #[test]
    fn an_alternative_is_enough_and_a_conjunction_needs_both() {
        let packages = [
            package("either", "1.0.0", Some("GPL-2.0-only OR MIT")),
            package("old-style", "1.0.0", Some("GPL-2.0/MIT")),
            package("both", "1.0.0", Some("MIT AND GPL-2.0-only")),
            package("none", "1.0.0", None),
        ];
        let breaches = licence_breaches(&policy(&["MIT"]), &packages).unwrap();
        let who: Vec<_> = breaches.iter().filter_map(|breach| breach.split(' ').next()).collect();
        assert_eq!(who, ["both", "none"]);
    }

    #[test]
    fn a_second_version_is_a_breach_unless_one_is_skipped_and_a_skip_must_match() {
        let text = r#"
            graph.targets = []
            licenses.allow = ["MIT"]
            [bans]
            multiple-versions = "deny"
            deny = [{ crate = "bad", reason = "it is" }]
            skip = [{ crate = "known@1.0.0", reason = "r" }, { crate = "gone@9.0.0", reason = "r" }]
        "#;
        let policy: Policy = toml::from_str(text).unwrap();
        let packages = [
            package("known", "1.0.0", None),
            package("known", "2.0.0", None),
            package("new", "1.0.0", None),
            package("new", "2.0.0", None),
            package("bad", "1.0.0", None),
        ];
        let breaches = ban_breaches(&policy, &packages.iter().collect::<Vec<_>>());
        assert_eq!(breaches.len(), 3, "{breaches:?}");
        assert!(breaches[0].starts_with("bad 1.0.0 is banned"));
        assert!(breaches[1].starts_with("new is there in 2 versions"));
        assert!(breaches[2].starts_with("skip of gone@9.0.0"));
    }
}
