//! Where the kernel refuses membarrier(2), rseq(2) or both, the gate counts portably and says
//! why. Each case is a process of its own under a seccomp filter that was there before it began.
#![allow(unsafe_code)]
#![cfg(target_arch = "x86_64")]

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use cofferdam_gate::{Cancel, Drain, Gate, Mechanism, mechanism, mechanism_reason};

/// Set in the child: it is to report, not to test.
const CHILD: &str = "COFFERDAM_SECCOMP_CHILD";

/// A filter that answers EPERM to the listed system calls and lets the rest through.
fn filter(refused: &[libc::c_long]) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number of the call lies at offset 0 of what the filter sees.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for call in refused {
        let number = u32::try_from(*call).expect("a small number");
        program.push(libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: number,
        });
        program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program
}

/// What a child of this program under that filter says.
fn under_filter(refused: &[libc::c_long]) -> String {
    let mut program = filter(refused);
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.args(["--exact", "report", "--nocapture"]).env(CHILD, "1").env_remove("COFFERDAM_GATE");
    let install = move || {
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: plain system calls with arguments that live long enough; async-signal-safe.
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
        };
        if installed { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: `install` makes two system calls and touches no memory but its own.
    unsafe { command.pre_exec(install) };
    let output = command.output().expect("the child starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// In the child: says what it found, and that the gate works all the same.
#[test]
fn report() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    std::thread::spawn(move || drop(guard)).join().expect("a thread");
    gate.close();
    assert!(gate.admit().is_err());
    gate.drain(Drain::Both, None, &Cancel::new()).expect("nothing is inside");
    println!("found {}: {}", mechanism(), mechanism_reason());
}

#[test]
fn refused_membarrier_means_the_portable_form() {
    let said = under_filter(&[libc::SYS_membarrier]);
    assert!(said.contains("found xadd: the kernel refused membarrier"), "{said}");
}

#[test]
fn refused_rseq_means_the_portable_form() {
    let said = under_filter(&[libc::SYS_rseq]);
    assert!(said.contains("found xadd: ") && said.contains("rseq"), "{said}");
}

#[test]
fn refused_both_means_the_portable_form() {
    let said = under_filter(&[libc::SYS_membarrier, libc::SYS_rseq]);
    assert!(said.contains("found xadd: "), "{said}");
}

#[test]
fn without_a_refusal_the_choice_is_that_of_this_process() {
    let said = under_filter(&[]);
    if std::env::var_os("COFFERDAM_GATE").is_none() {
        assert!(said.contains(&format!("found {}: ", mechanism())), "{said}");
    } else {
        assert_eq!(mechanism(), Mechanism::Xadd);
    }
}
