//! The least that a compiler and a linker for BPF must manage. `cargo xtask setup` builds it to see
//! whether a toolchain works before choosing it.
#![no_std]
#![no_main]

use core::ffi::c_void;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 4] = *b"GPL\0";

#[unsafe(no_mangle)]
#[unsafe(link_section = "cgroup/connect4")]
pub extern "C" fn trial(_context: *mut c_void) -> i32 {
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
