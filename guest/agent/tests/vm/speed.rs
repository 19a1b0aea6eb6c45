//! How fast things are, printed; `--nocapture --ignored speed` shows it. Bounds are loose: the machine may be busy.

use std::time::{Duration, Instant};

use crate::harness::{Vm, create, process, setup};
use crate::run::run;

fn median(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort();
    (times[times.len() / 2].as_secs_f64() * 1e3, times[0].as_secs_f64() * 1e3)
}

#[tokio::test]
#[ignore = "a measurement"]
async fn speed() {
    let vm = Vm::boot_with(256, &[], &[]).await;
    let mut client = vm.connect().await;
    let answer = client.setup(setup()).await.expect("setup").into_inner();
    println!(
        "kernel {} ms, agent {} ms",
        answer.kernel_ns / 1_000_000,
        (answer.agent_ns - answer.kernel_ns) as f64 / 1e6
    );

    let mut times = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        client.stats(pykata_agent::proto::StatsRequest {}).await.expect("stats");
        times.push(began.elapsed());
    }
    println!("stats: median {:.2} ms, best {:.2} ms", median(times.clone()).0, median(times).1);

    client.create_container(create("c", "")).await.expect("created");
    for (name, args) in [("true", &["true"][..]), ("missing", &["no-such"])] {
        let mut times = Vec::new();
        for _ in 0..60 {
            let began = Instant::now();
            run(&mut client, "c", process("p", args), None).await.expect("runs");
            times.push(began.elapsed());
        }
        let (median, best) = median(times[10..].to_vec());
        println!("run {name}: median {median:.2} ms, best {best:.2} ms");
    }
    let mut times = Vec::new();
    for _ in 0..30 {
        let began = Instant::now();
        run(&mut client, "i", process("p", &["true"]), Some(create("i", ""))).await.expect("runs");
        times.push(began.elapsed());
    }
    println!(
        "create + run + remove: median {:.2} ms, best {:.2} ms",
        median(times[5..].to_vec()).0,
        median(times[5..].to_vec()).1
    );
    let stats = client.stats(pykata_agent::proto::StatsRequest {}).await.expect("stats").into_inner();
    println!(
        "agent: {} KiB resident, {} descriptors; container: {} KiB",
        stats.agent_rss / 1024,
        stats.open_files,
        stats.containers["c"].memory_current / 1024
    );
}

#[tokio::test]
#[ignore = "a measurement"]
async fn throughput() {
    let (_vm, mut client) = Vm::ready().await;
    client.create_container(create("c", "")).await.expect("created");
    for script in ["head -c 50000000 /dev/zero", "dd if=/dev/zero bs=1M count=50 2>/dev/null"] {
        let began = Instant::now();
        let done = run(&mut client, "c", process("p", &["sh", "-c", script]), None).await.expect("runs");
        println!("stdout of {script}: {:.1} MB/s", done.stdout.len() as f64 / began.elapsed().as_secs_f64() / 1e6);
    }
}
