use qemu_tests::*;
fn main() -> anyhow::Result<()> {
    use std::time::*;
    interrupt::install()?;
    let a = artifacts::Artifacts::read(std::path::Path::new("/var/tmp/pfdev/qt/artifacts.json"))?;
    let d = workdir::create()?;
    let i = d.path().join("i");
    initramfs::build_guest(&a, &i)?;
    let logs = std::path::Path::new("/var/tmp/pfdev/qt/logs");
    std::fs::create_dir_all(logs)?;
    let cg = cgroup::MemoryCgroup::create()?;
    let mut gs = vec![];
    let t = Instant::now();
    for n in ["a", "b"] {
        let c = guest::Config { name: n.into(), mode: guest::Mode::Systemd, accelerator: guest::Accelerator::Tcg, memory_mib: 1024, cpus: 1, cpu: "max", kernel: a.kernel.clone(), initramfs: i.clone(), disks: vec![a.guest_image.clone()], arguments: vec![] };
        gs.push(guest::Guest::start(&c, std::process::Command::new(&a.qemu), Some(&cg), logs)?);
    }
    for g in &mut gs { println!("up {} {:?}", g.wait_agent(Duration::from_secs(200))?, t.elapsed()); }
    for g in &mut gs { g.wait_services(&["nginx", "postgresql@*", "pagefusion-python"], Duration::from_secs(200))?; println!("services {:?}", t.elapsed()); }
    let m = manifest::Manifest::read(&a.guest_manifest)?;
    for g in &mut gs {
        let files: Vec<String> = g.request(protocol::Op::MappedFiles)?;
        let n = files.len();
        println!("mapped {n}: {:?}", t.elapsed());
        let sums: Vec<protocol::FileSum> = g.request(protocol::Op::Checksum { paths: files })?;
        let bytes: u64 = sums.iter().map(|s| s.bytes).sum();
        let bad: Vec<_> = sums.iter().filter_map(|s| m.compare(s).err()).collect();
        let not: Vec<_> = sums.iter().filter(|s| !m.has(&s.path)).map(|s| &s.path).collect();
        println!("bytes {bytes} bad {bad:?} not in manifest {not:?} {:?}", t.elapsed());
    }
    let pids: Vec<_> = gs.iter().map(|g| g.pid()).collect();
    for g in &mut gs { g.pause()?; }
    for _ in 0..3 { println!("charge {} frames {}", cg.charge()?, frames::distinct(&pids)? * 4096); }
    for g in &mut gs { g.resume()?; }
    println!("{}", gs[0].output(&["sh", "-c", "free -m; uptime; ls /sys/bus/pci/devices; systemd-analyze; systemctl list-units --type=service --no-pager | cat"])?);
    println!("{}", gs[0].output(&["runuser", "-u", "postgres", "--", "psql", "-Atc", "select sum(x) from generate_series(1,1000) x"])?);
    let _ = gs[0].request::<serde_json::Value>(protocol::Op::Write { path: "/proc/sysrq-trigger".into(), data: "c".into() }).map_err(|e| println!("EXPECTED: {e:#}"));
    println!("{:?}", gs[0].wait_failure(Duration::from_secs(5)));
    Ok(())
}
