//! Debian packages, downloaded and unpacked into the target folder. No list or cache of the machine is touched, and nothing is installed but by
//! [`Apt::install`].
//!
//! apt runs with folders of its own and with one list of sources that is made here: the mirrors are those of the machine's own sources
//! (proxies and the like come from the machine's configuration as always), the suites are those that carry what is asked for, and
//! signatures are checked with Debian's keyring.

use crate::{packages, step, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Debian's public names, for a Debian whose sources name no mirror.
const ARCHIVE: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// What a suite begins with when it is one of Debian's.
const DEBIAN_SUITES: [&str; 11] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "oldoldstable",
];

/// The name of this Debian release: `bookworm`.
pub(crate) fn codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    field("VERSION_CODENAME").filter(|_| field("ID").as_deref() == Some("debian"))
}

/// Where packages are downloaded to, and apt keeps its lists.
pub(crate) fn folder() -> PathBuf {
    workspace::target().join("debian")
}

/// apt with folders, sources and options of its own.
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Reads the lists of `suites`.
    pub(crate) fn new(suites: &[&str]) -> Result<Apt> {
        if !packages::is_installed("apt-get") || !packages::is_installed("dpkg-deb") {
            bail!("this is no Debian");
        }
        if !Path::new(KEYRING).is_file() {
            bail!("the package debian-archive-keyring is not installed");
        }
        let folder = folder().join("apt").join(suites.join("+"));
        for part in ["lists/partial", "cache/archives/partial", "empty"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let mirrors = Mirrors::of_this_machine();
        let lines = suites.iter().map(|suite| {
            let mirror = if suite.ends_with("-security") { &mirrors.security } else { &mirrors.archive };
            format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")
        });
        fs::write(folder.join("sources.list"), lines.collect::<String>())?;
        // The machine's hooks are for its own lists, and its indexes of icons and translations are of no use here.
        fs::write(
            folder.join("apt.conf"),
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n#clear Acquire::IndexTargets::deb::DEP-11;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons;\n#clear Acquire::IndexTargets::deb::DEP-11-icons-small;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons-large;\nAcquire::Languages \"none\";\nAPT::Sandbox::User \"root\";\n\
             Acquire::Retries \"2\";\nAcquire::http::Timeout \"20\";\n",
        )?;
        let at = |part: &str| folder.join(part).display().to_string();
        let options = [
            format!("-c={}", at("apt.conf")),
            format!("-oDir::Etc::sourcelist={}", at("sources.list")),
            format!("-oDir::Etc::sourceparts={}", at("empty")),
            "-oDir::Etc::preferences=/dev/null".to_owned(),
            format!("-oDir::Etc::preferencesparts={}", at("empty")),
            format!("-oDir::State::lists={}", at("lists")),
            format!("-oDir::Cache={}", at("cache")),
        ];
        let apt = Apt { options: options.to_vec() };
        let what = format!("reading Debian's lists ({})", suites.join(", "));
        step::with_signs_of_life(&what, || step::output(apt.command("apt-get").args(["--quiet", "update"])))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").args(&self.options);
        command
    }

    /// The versions of `package` on offer, as apt orders them.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = step::output(self.command("apt-cache").args(["madison", package]))?;
        Ok(text.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect())
    }

    /// The packages on offer whose names match a pattern of apt's.
    pub(crate) fn named(&self, pattern: &str) -> Result<Vec<String>> {
        let text = step::output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
        Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
    }

    /// Downloads packages (`NAME`, the newest, or `NAME=VERSION`) without what they depend on and unpacks them into `into`, which appears only when it is
    /// complete.
    pub(crate) fn unpack(&self, packages: &[&str], into: &Path) -> Result<()> {
        let work = tempfile::Builder::new().prefix("unpack-").tempdir_in(folder())?;
        step::announce(&format!("downloading {} from Debian", packages.join(" ")));
        step::with_signs_of_life("the download", || {
            let mut apt = self.command("apt-get");
            step::output(apt.current_dir(work.path()).args(["--quiet", "download"]).args(packages))
        })?;
        extract(work.path(), &work.path().join("root"), into)
    }

    /// Installs a package, from `suite` where that has it, whatever the machine's own lists and preferences say.
    pub(crate) fn install(&self, package: &str, suite: &str) -> Result<()> {
        step::announce(&format!("installing {package} from {suite}"));
        step::with_signs_of_life("the installation", || {
            let mut apt = self.command("apt-get");
            apt.env("DEBIAN_FRONTEND", "noninteractive");
            apt.args(["--quiet", "install", "--yes", "--no-remove", "--no-install-recommends"]);
            apt.args(["--target-release", suite, package]);
            step::output(&mut apt)
        })?;
        Ok(())
    }

    /// Downloads the newest of each package and whatever of their dependencies is not installed, and unpacks them as [`Self::unpack`] does.
    pub(crate) fn unpack_with_dependencies(&self, packages: &[&str], into: &Path) -> Result<()> {
        let work = tempfile::Builder::new().prefix("unpack-").tempdir_in(folder())?;
        fs::create_dir(work.path().join("partial"))?;
        step::announce(&format!("downloading {} from Debian", packages.join(" ")));
        step::with_signs_of_life("the download", || {
            let mut apt = self.command("apt-get");
            // Only to be downloaded: nothing of the machine changes, so no lock of the machine is needed.
            apt.args(["--quiet", "--yes", "--download-only", "--no-install-recommends", "-oDebug::NoLocking=1"])
                .arg(format!("-oDir::Cache::archives={}", work.path().display()))
                .arg("install")
                .args(packages);
            step::output(&mut apt)
        })?;
        extract(work.path(), &work.path().join("root"), into)
    }
}

/// Unpacks every package in `archives` into `root` and renames that to `into`.
fn extract(archives: &Path, root: &Path, into: &Path) -> Result<()> {
    for entry in archives.read_dir()? {
        let archive = entry?.path();
        if archive.extension().is_some_and(|extension| extension == "deb") {
            step::with_signs_of_life("unpacking", || {
                step::output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(root))
            })?;
        }
    }
    if let Some(parent) = into.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::rename(root, into) {
        Err(error) if !into.is_dir() => Err(error).with_context(|| format!("cannot keep {}", into.display())),
        _ => Ok(()),
    }
}

/// Where this machine gets Debian from.
#[derive(Debug, PartialEq)]
struct Mirrors {
    archive: String,
    security: String,
}

impl Mirrors {
    fn of_this_machine() -> Mirrors {
        let mut texts = vec![fs::read_to_string("/etc/apt/sources.list").unwrap_or_default()];
        if let Ok(entries) = Path::new("/etc/apt/sources.list.d").read_dir() {
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            let is_sources = |path: &&PathBuf| path.extension().is_some_and(|kind| kind == "list" || kind == "sources");
            texts.extend(paths.iter().filter(is_sources).filter_map(|path| fs::read_to_string(path).ok()));
        }
        Mirrors::of(&texts)
    }

    /// The first mirror of each kind among one-line and deb822 sources.
    fn of(texts: &[String]) -> Mirrors {
        let (mut archive, mut security) = (None, None);
        for (uri, suite) in texts.iter().flat_map(|text| entries(text)) {
            if !DEBIAN_SUITES.iter().any(|debian| suite.split(['-', '/']).next() == Some(debian)) {
                continue;
            }
            let kind = if suite.contains("security") || uri.contains("debian-security") {
                &mut security
            } else {
                &mut archive
            };
            kind.get_or_insert(uri.trim_end_matches('/').to_owned());
        }
        Mirrors {
            archive: archive.unwrap_or_else(|| ARCHIVE.to_owned()),
            security: security.unwrap_or_else(|| SECURITY.to_owned()),
        }
    }
}

/// Every (URI, suite) of a file of sources.
fn entries(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().peekable();
        if words.next() != Some("deb") {
            continue;
        }
        // Options are in brackets, with or without spaces inside.
        if words.peek().is_some_and(|word| word.starts_with('[')) {
            for word in words.by_ref() {
                if word.ends_with(']') {
                    break;
                }
            }
        }
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            found.push((uri.to_owned(), suite.to_owned()));
        }
    }
    for stanza in text.split("\n\n") {
        let field = |name: &str| -> Vec<String> {
            let found = stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            found.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        if field("Types").iter().any(|kind| kind == "deb") && field("Enabled").first().is_none_or(|value| value != "no")
        {
            let suites = field("Suites");
            for uri in field("URIs") {
                found.extend(suites.iter().map(|suite| (uri.clone(), suite.clone())));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(texts: &[&str]) -> Mirrors {
        Mirrors::of(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn mirrors_are_those_of_the_machine_in_either_format() {
        let expected = Mirrors { archive: "http://a.test/debian".into(), security: "http://s.test/sec".into() };
        let lines = "# comment\ndeb [arch=amd64 signed-by=/x] http://a.test/debian/ bookworm main\ndeb http://s.test/sec bookworm-security main";
        assert_eq!(mirrors(&[lines]), expected);
        let stanzas = "Types: deb\n# note\nURIs: http://a.test/debian\nSuites: trixie trixie-updates\nComponents: main\n\n\
            Types: deb\nURIs: http://s.test/sec\nSuites: trixie-security\n";
        assert_eq!(mirrors(&[stanzas]), expected);
    }

    #[test]
    fn a_machine_without_debian_mirrors_gets_the_public_names() {
        let others = ["deb http://u.test/ubuntu noble main", "Types: deb\nURIs: http://n.test/x\nSuites: nodistro\n"];
        assert_eq!(mirrors(&others), Mirrors { archive: ARCHIVE.into(), security: SECURITY.into() });
    }
}
