//! Boots real guests on real QEMU, shares their memory and checks from outside that it was saved and that nothing
//! broke.
//!
//! Nothing here is a mock. A *guest* is a Debian machine with an agent on its second serial port ([`agent`],
//! [`protocol`]); the harness waits for its events, watches its console and believes the memory cgroup only.

pub mod agent;
pub mod artifacts;
pub mod bench;
pub mod cgroup;
pub mod changes;
pub mod console;
pub mod daemon;
pub mod demo;
pub mod frames;
pub mod guest;
pub mod initramfs;
pub mod integrity;
pub mod interrupt;
pub mod khugepaged;
pub mod kmod;
pub mod kvm;
pub mod lab;
pub mod manifest;
pub mod pattern;
pub mod process;
pub mod progress;
pub mod proof;
pub mod protocol;
pub mod report;
pub mod scenarios;
pub mod services;
pub mod settle;
pub mod standstill;
pub mod suite;
pub mod workdir;
pub mod world;
