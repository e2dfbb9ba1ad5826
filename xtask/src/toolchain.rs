//! A Rust that can compile for `wasm32-unknown-unknown`.
//!
//! Steps in this order; the first that works is taken, and said:
//!
//! 1. `installed`: the target is there.
//! 2. `rustup`: `rustup target add`, what a machine with a network to the Rust distribution does.
//! 3. `cache`: a sysroot that step 4 built earlier, for exactly this compiler.
//! 4. `source`: the standard library is compiled from source of exactly this compiler's version: rustup's component rust-src,
//!    `$COFFERDAM_RUST_LIBRARY`, an installed Debian package, or Debian's package `rust-src`, which is unpacked and not installed.
//! 5. `debian-compiler`: Debian's `rustc-web` with its own `rust-web-src`, unpacked and not installed. The two always match each other, so
//!    this works when Debian has moved on from this compiler's version.
//! 6. One message with the command that helps.
//!
//! `COFFERDAM_WASM_TOOLCHAIN` names the one step to take; the others are left out (for tests, and for a machine that must not be changed).
//! Nothing outside the target folder is written, except by rustup in step 2.

mod debian;
mod sysroot;

use crate::step;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What guests are compiled for.
pub(crate) const TARGET: &str = "wasm32-unknown-unknown";

/// The variable that names the one step to take.
const ONLY: &str = "COFFERDAM_WASM_TOOLCHAIN";

/// The variable that says where the standard library's source is (a folder that holds `std` and `core`).
const LIBRARY: &str = "COFFERDAM_RUST_LIBRARY";

/// One way to a toolchain.
type Step = fn(&Compiler) -> Result<Toolchain>;

/// Tried in this order.
const STEPS: [(&str, Step); 5] = [
    ("installed", installed),
    ("rustup", rustup),
    ("cache", cache),
    ("source", source),
    ("debian-compiler", debian_compiler),
];

/// A compiler and where it finds the standard library of [`TARGET`].
#[derive(Debug)]
pub(crate) struct Toolchain {
    compiler: Compiler,
    /// None: the compiler's own.
    sysroot: Option<PathBuf>,
    /// For the reader: which step, and what it used.
    how: String,
}

impl Toolchain {
    /// Finds or makes one, and says how.
    pub(crate) fn find() -> Result<Toolchain> {
        let compiler = Compiler::of_the_user()?;
        let only = std::env::var(ONLY).ok().filter(|name| !name.is_empty());
        if let Some(name) = &only
            && STEPS.iter().all(|(step, _)| step != name)
        {
            let names = STEPS.map(|(step, _)| step).join(", ");
            bail!("{ONLY} is {name:?} and none of: {names}");
        }
        let mut failures = String::new();
        for (name, step) in STEPS {
            if only.as_ref().is_some_and(|only| only != name) {
                continue;
            }
            match step(&compiler) {
                Ok(toolchain) => {
                    step::announce(&format!("Rust for {TARGET}: {}", toolchain.how));
                    return Ok(toolchain);
                }
                Err(error) => failures += &format!("\n  {name}: {error:#}"),
            }
        }
        bail!(
            "rustc {} cannot compile for {TARGET}, and nothing that was tried gave it a standard library:{failures}\n\
             What helps: rustup target add {TARGET}",
            compiler.release
        )
    }

    /// `cargo COMMAND --target ...` with this toolchain, in the root of the workspace.
    pub(crate) fn cargo(&self, command: &str) -> Command {
        let mut flags = self.compiler.flags.clone();
        if let Some(sysroot) = &self.sysroot {
            flags.push(format!("--sysroot={}", sysroot.display()));
        }
        let mut cargo = self.compiler.cargo(&flags);
        cargo.args([command, "--target", TARGET]);
        cargo
    }
}

fn cargo_home() -> Option<PathBuf> {
    let home =
        std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cargo")))?;
    home.is_absolute().then_some(home)
}

/// One rustc.
#[derive(Clone, Debug)]
struct Compiler {
    rustc: PathBuf,
    /// `1.95.0`.
    release: String,
    /// The commit, or `unknown` where a distribution does not say.
    commit: String,
    host: String,
    /// What is set for it and for what it compiles besides the sysroot.
    flags: Vec<String>,
    /// Variables it needs.
    variables: Vec<(&'static str, PathBuf)>,
}

impl Compiler {
    /// The one that cargo would take.
    fn of_the_user() -> Result<Compiler> {
        let rustc = std::env::var_os("RUSTC").filter(|path| !path.is_empty());
        Compiler::new(rustc.map_or_else(|| "rustc".into(), PathBuf::from), Vec::new(), Vec::new())
    }

    fn new(rustc: PathBuf, flags: Vec<String>, variables: Vec<(&'static str, PathBuf)>) -> Result<Compiler> {
        let mut compiler =
            Compiler { rustc, release: String::new(), commit: String::new(), host: String::new(), flags, variables };
        let text = compiler.ask(&["-vV"])?;
        let field = |name: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            found.map(str::to_owned)
        };
        compiler.release = field("release").context("rustc -vV names no release")?;
        compiler.host = field("host").context("rustc -vV names no host")?;
        compiler.commit = field("commit-hash").unwrap_or_else(|| "unknown".to_owned());
        Ok(compiler)
    }

    /// Runs rustc for what it prints.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut rustc = Command::new(&self.rustc);
        // The root folder decides which toolchain rustup's proxy takes, as it does for cargo.
        rustc
            .current_dir(crate::workspace::root())
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .args(arguments);
        step::output(&mut rustc)
    }

    /// A cargo that takes this compiler, `flags` for what is compiled for [`TARGET`], and nothing of the caller's own flags.
    fn cargo(&self, flags: &[String]) -> Command {
        // A component names no folder of the machine that built it, so that it is the same wherever it is built. The caller's come last: of
        // several prefixes that fit, rustc takes the last.
        let mut all = vec![format!("--remap-path-prefix={}=.", crate::workspace::root().display())];
        if let Some(home) = cargo_home() {
            all.push(format!("--remap-path-prefix={}=/cargo", home.display()));
        }
        all.extend_from_slice(flags);
        let mut cargo = crate::workspace::cargo();
        // This variable goes before RUSTFLAGS and before what configuration files say; set but empty it still does.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", all.join("\x1f"));
        for variable in
            ["RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_BOOTSTRAP"]
        {
            cargo.env_remove(variable);
        }
        if self.rustc != Path::new("rustc") {
            cargo.env("RUSTC", &self.rustc);
        }
        cargo.envs(self.variables.iter().map(|(name, value)| (name, value)));
        cargo
    }
}

/// Whether `folder` holds a compiled standard library.
fn has_std(folder: &Path) -> bool {
    let Ok(entries) = folder.read_dir() else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libstd-")
            && name.ends_with(".rlib")
            && entry.metadata().is_ok_and(|metadata| metadata.len() > 0)
    })
}

/// Step 1.
fn installed(compiler: &Compiler) -> Result<Toolchain> {
    let folder = compiler.ask(&["--print", "target-libdir", "--target", TARGET])?;
    if !has_std(Path::new(folder.trim())) {
        bail!("the target is not installed");
    }
    let how = format!("installed with rustc {}", compiler.release);
    Ok(Toolchain { compiler: compiler.clone(), sysroot: None, how })
}

/// Step 2.
fn rustup(compiler: &Compiler) -> Result<Toolchain> {
    let sysroot = compiler.ask(&["--print", "sysroot"])?;
    let toolchains = step::output(Command::new("rustup").args(["toolchain", "list", "--verbose"]))?;
    if !toolchains.contains(sysroot.trim()) {
        bail!("rustc {} is not rustup's", compiler.release);
    }
    step::with_signs_of_life("rustup target add", || {
        step::output(Command::new("rustup").current_dir(crate::workspace::root()).args(["target", "add", TARGET]))
    })?;
    let mut toolchain = installed(compiler)?;
    toolchain.how = format!("rustup added it to rustc {}", compiler.release);
    Ok(toolchain)
}

/// Step 3.
fn cache(compiler: &Compiler) -> Result<Toolchain> {
    let sysroot = sysroot::cached(compiler).context("no standard library was built here for this compiler")?;
    let how = format!("a standard library that was built earlier for rustc {}", compiler.release);
    Ok(Toolchain { compiler: compiler.clone(), sysroot: Some(sysroot), how })
}

/// Step 4.
fn source(compiler: &Compiler) -> Result<Toolchain> {
    let own = Path::new(compiler.ask(&["--print", "sysroot"])?.trim())
        .join("lib")
        .join("rustlib")
        .join("src")
        .join("rust")
        .join("library");
    let named = std::env::var_os(LIBRARY).map(PathBuf::from);
    let debian = PathBuf::from(format!("/usr/src/rustc-{}/library", compiler.release));
    let mut failures = String::new();
    let there = [("rustup's rust-src", Some(own)), (LIBRARY, named), ("Debian's rust-src", Some(debian))];
    for (what, library) in there {
        let Some(library) = library else { continue };
        match build(compiler, &library, what) {
            Ok(toolchain) => return Ok(toolchain),
            Err(error) => failures += &format!("\n    {what}: {error:#}"),
        }
    }
    let what = "Debian's package rust-src";
    match debian::rust_src(&compiler.release).and_then(|library| build(compiler, &library, what)) {
        Ok(toolchain) => Ok(toolchain),
        Err(error) => bail!("{}\n    {what}: {error:#}", failures.trim_start_matches('\n')),
    }
}

fn build(compiler: &Compiler, library: &Path, what: &str) -> Result<Toolchain> {
    let sysroot = sysroot::build(compiler, library)?;
    let how = format!("a standard library built from {what} for rustc {}", compiler.release);
    Ok(Toolchain { compiler: compiler.clone(), sysroot: Some(sysroot), how })
}

/// Step 5.
fn debian_compiler(user: &Compiler) -> Result<Toolchain> {
    let package = debian::compiler(&user.host)?;
    // Its own linker for Wasm is a program of another package; rustup's compiler has one.
    let lld = Path::new(user.ask(&["--print", "sysroot"])?.trim())
        .join("lib")
        .join("rustlib")
        .join(&user.host)
        .join("bin")
        .join("rust-lld");
    let flags = if lld.is_file() { vec![format!("-Clinker={}", lld.display())] } else { Vec::new() };
    let compiler = Compiler::new(package.rustc, flags, vec![("LD_LIBRARY_PATH", package.libraries)])?;
    if let Ok(toolchain) = cache(&compiler) {
        return Ok(toolchain);
    }
    build(&compiler, &package.library, "Debian's rust-web-src")
}
