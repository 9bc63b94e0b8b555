//! The tiles of AMX: registers of sixteen rows of 64 bytes, and one instruction for the product of two of them. Rust's intrinsics for it are not stable, so
//! this is assembly.
#![allow(unsafe_code)] // the instruction set itself

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
#[cfg(target_arch = "x86_64")]
use std::cell::Cell;
use std::marker::PhantomData;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa, limit};
#[cfg(target_arch = "x86_64")]
use super::tile::{COLS, ROWS};

/// That the tile registers of this thread have the shapes that [`Tiles::sums`] needs, until this is dropped. One at a time on a thread, and while it is there
/// nothing of others may run on the thread that uses such registers.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Never made.
pub(super) struct Tiles(PhantomData<*const ()>);

/// Whether the processor has tiles with products of bytes and the system lets this process use them. `ERNIE_ISA` rules them out, whichever set it names.
#[cfg(target_arch = "x86_64")]
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE
        .get_or_init(|| limit().is_none() && isa() == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") && has_tiles() && permitted())
}

/// No other architecture has them.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn available() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    // Leaf 7, which all processors with AVX-512 have: AMX-TILE and AMX-INT8.
    const BITS: u32 = 1 << 24 | 1 << 25;
    std::arch::x86_64::__cpuid_count(7, 0).edx & BITS == BITS
}

/// Asks the system for the registers, which are too large for it to save them for every process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: a system call that reads and writes no memory of the program; it changes which registers all of its threads may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    answer == 0
}

/// How to ask other systems is not known here.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn permitted() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// Whether this thread has a [`Tiles`].
    static SHAPED: Cell<bool> = const { Cell::new(false) };
}

/// What `ldtilecfg` reads.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

#[cfg(not(target_arch = "x86_64"))]
impl Tiles {
    /// There are none.
    pub(super) fn shaped() -> Option<Self> {
        None
    }
}

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// Shapes the tiles of this thread, where there are any.
    pub(super) fn shaped() -> Option<Self> {
        if !available() {
            return None;
        }
        const { assert!(ROWS <= 16 && COLS == 32) };
        assert!(!SHAPED.replace(true), "the end of the inner tiles would be that of the outer ones");
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        // Two tiles of sums, one of the left operand, two of the right.
        for (tile, rows) in [ROWS, ROWS, ROWS, 16, 16].into_iter().enumerate() {
            (shapes.row_bytes[tile], shapes.rows[tile]) = (64, rows as u8);
        }
        // SAFETY: the tiles are there and allowed; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags)) };
        Some(Tiles(PhantomData))
    }

    /// out(i, j) = Σ a(i) · b(j) over `steps` times 64 bytes, of signed by unsigned bytes: `ROWS` rows of a, each `stride` bytes behind the one before, and
    /// b in words of four bytes, `[16 · steps, COLS]`.
    ///
    /// # Safety
    /// a and b must be as long as that, and out be there to be written; one step at least.
    #[inline]
    pub(super) unsafe fn sums(&self, out: *mut [[i32; COLS]; ROWS], (a, stride): (*const u8, usize), b: *const u8, steps: usize) {
        // SAFETY: `self` says that the tiles are shaped; each step reads 64 bytes of the rows of a and 16 rows of b, whose length is also that of a row of sums.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{a} + 1*{stride}]",
                "tileloadd tmm3, [{b} + 1*{width}]",
                "tdpbsud tmm0, tmm2, tmm3",
                "tileloadd tmm4, [{b} + 1*{width} + 64]",
                "tdpbsud tmm1, tmm2, tmm4",
                "add {a}, 64",
                "add {b}, {step}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + 1*{width}], tmm0",
                "tilestored [{out} + 1*{width} + 64], tmm1",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                steps = inout(reg) steps => _,
                stride = in(reg) stride,
                width = in(reg) 4 * COLS,
                out = in(reg) out,
                step = const 16 * 4 * COLS,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                options(nostack)
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: frees registers that nothing but this uses.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        SHAPED.set(false);
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Otherwise a slip in asking for the tiles would leave them untested, or another instruction set where they take its place.
    #[test]
    fn tiles_are_used_where_they_are_and_nothing_rules_them_out() {
        assert!(limit().is_none() || !available(), "{:?} has no tiles", limit());
        // What the system says of the processor, where it does.
        let Ok(description) = std::fs::read_to_string("/proc/cpuinfo") else { return };
        let flags: Vec<&str> = description.lines().find(|line| line.starts_with("flags")).unwrap_or_default().split_whitespace().collect();
        let all = ["amx_tile", "amx_int8", "avx512_vnni"].iter().all(|flag| flags.contains(flag));
        if all && limit().is_none() && isa() == Isa::Avx512 {
            assert!(has_tiles() && permitted() && available());
        }
    }
}
