//! Many VPs: how many there can be, that all of them get on however few CPUs the host has, where they run and what they see.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_client::{CpuidMask, GuestConfig, MemoryConfig, Rendering, VpAffinity};
use guest_schema::GuestError;
use guest_tests::census;
use guest_tests::requirements::{Requirement, run, trial};
use guest_tests::stage::{Act, Channel, Kind, Player, Running, Stage, Story, expect, play_on, refused, says};
use guest_tests::wait;
use libtest_mimic::Trial;
use processor::HostCpus;

/// How long many VPs may take on few CPUs that others use, too.
const LONG: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for cpus in [1, 2, 8, 64] {
        trials.push(on_kvm(&format!("{cpus}_get_on"), move |stage| all_get_on(stage, cpus, VpAffinity::Any)));
    }
    trials.push(on_kvm("8_get_on_on_one_cpu", |stage| async {
        let cpu = last_cpu()?;
        all_get_on(stage, 8, VpAffinity::All([cpu].into())).await
    }));
    trials.push(on_kvm("as_many_as_the_host_allows", as_many_as_the_host_allows));
    trials.push(on_kvm("what_is_hidden_is_not_seen", what_is_hidden_is_not_seen));
    trials.push(on_kvm("all_vps_of_a_fork_go_on", all_vps_of_a_fork_go_on));
    for kind in [Kind::Scripted, Kind::BuiltIn] {
        let play = move |stage| each_runs_where_it_may(stage);
        trials.push(on(kind, "each_runs_where_it_may", play));
    }
    run(trials, || {})
}

fn on<F: Future<Output = Story>>(
    kind: Kind,
    name: &str,
    story: impl FnOnce(Stage) -> F + Send + 'static,
) -> Trial {
    let needs: &[Requirement] = if kind == Kind::BuiltIn { &[Requirement::Kvm] } else { &[] };
    trial(&format!("{}::{name}", kind.name()), needs, move || {
        play_on(Stage::set(kind, Channel::Direct, "")?, story)
    })
}

fn on_kvm<F: Future<Output = Story>>(name: &str, story: impl FnOnce(Stage) -> F + Send + 'static) -> Trial {
    on(Kind::BuiltIn, name, story)
}

/// The last of the host's CPUs that this process, and so the VMM, may use.
fn last_cpu() -> anyhow::Result<u32> {
    HostCpus::of_this_thread()?.iter().last().context("a CPU")
}

/// Sends the guest a line, and waits for its answer.
async fn ask(running: &Running, command: &str, answer: &str) -> Story {
    let before = running.console.text().len();
    running.input.write(format!("{command}\n").as_bytes()).await?;
    let line = format!("{answer}\n");
    let answered = || async {
        let seen = running.console.text().split_off(before);
        if seen.contains(&line) { Ok(()) } else { Err(seen) }
    };
    Ok(wait::found_async(&format!("{answer:?}"), LONG, answered).await?)
}

async fn end(player: &Player, running: Running) -> Story {
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

/// The VPs that a guest has started work in its forks, too, at the same time as in the guest.
async fn all_vps_of_a_fork_go_on(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play_config(&GuestConfig { cpus: 8, ..parent.config(Act::Spin)? }).await?;
    ask(&running, "vps", "vps 8").await?;
    let snapshot = parent.lifecycle.control().snapshot().await?;
    expect("VPs of the snapshot", snapshot.info().await?.vps, 8)?;
    let mut all = vec![(parent, running)];
    for id in ["first", "second"] {
        let fork = stage.launch_from(&snapshot, &all[0].0.host, id).await?;
        let running = fork.run_config(&GuestConfig::new(None, 0)).await?;
        all.push((fork, running));
    }
    futures::future::try_join_all(all.iter().map(|(_, running)| ask(running, "count", "count 7000"))).await?;
    for (player, running) in all {
        end(&player, running).await?;
    }
    Ok(())
}

/// All come up, and each does its part of a common work: before a reset, and after it.
async fn all_get_on(stage: Stage, cpus: u32, affinity: VpAffinity) -> Story {
    let player = stage.launch("").await?;
    let memory = MemoryConfig::of_bytes(64 << 20);
    let config = GuestConfig { cpus, affinity, memory, ..player.config(Act::PowerOff)? };
    let running = player.play_config(&config).await?;
    let up = async || ask(&running, "vps", &format!("vps {cpus}")).await;
    let work = async || ask(&running, "count", &format!("count {}", (cpus - 1) * 1000)).await;
    up().await?;
    work().await?;
    expect("VPs", running.guest.observer().state().await?.vps.len(), cpus as usize)?;
    player.cue(&running, Act::Reset).await?;
    running.console.saw_times("READY", 2).await?;
    up().await?;
    work().await?;
    end(&player, running).await
}

/// The host's limit is what KVM says, or 254 if that is less: a guest may have so many, and not one more.
async fn as_many_as_the_host_allows(stage: Stage) -> Story {
    let limit = kvm_ioctls::Kvm::new()?.get_max_vcpus().min(254);
    let limit = u32::try_from(limit)?;
    let player = stage.launch("").await?;
    let of = |cpus| anyhow::Ok(GuestConfig { cpus, ..player.config(Act::Spin)? });
    let (code, detail) = refused(player.lifecycle.create(&of(limit + 1)?).await)?;
    expect(&detail, code, GuestError::BadConfig)?;
    says(&detail, &format!("cpus: {} is not from 1 to {limit}", limit + 1))?;
    player.lifecycle.create(&of(limit)?).await?;
    let vps = player.lifecycle.bind().observer().state().await?.vps.len();
    expect("VPs", vps, limit as usize)?;
    Ok(player.lifecycle.stop().await?)
}

/// The kernel, and `inspect`, say of each VP's thread what the config does.
async fn each_runs_where_it_may(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let (anywhere, last) = (HostCpus::of_this_thread()?, last_cpu()?);
    let first = anywhere.iter().next().context("a CPU")?;
    let each = VpAffinity::Each(vec![[first].into(), BTreeSet::new(), [last].into()]);
    let cases = [
        (VpAffinity::Any, [anywhere.to_string(), anywhere.to_string(), anywhere.to_string()]),
        (VpAffinity::All([last].into()), [last.to_string(), last.to_string(), last.to_string()]),
        (each, [first.to_string(), anywhere.to_string(), last.to_string()]),
    ];
    for (affinity, expected) in cases {
        let config = GuestConfig { cpus: 3, affinity, ..player.config(Act::Spin)? };
        let running = player.play_config(&config).await?;
        let (threads, observer) = (census::thread_affinities(player.pid().await?)?, running.guest.observer());
        for (vp, cpus) in expected.iter().enumerate() {
            expect("a VP's thread", threads.get(&format!("vp-{vp}")), Some(cpus))?;
            let shown = observer.inspect(&format!("vps/{vp}/affinity"), 0, Rendering::Text).await?;
            expect("what is shown", shown.trim_end(), &cpus[..])?;
        }
        expect("the VMM's own thread", threads.get("guest-vmm"), Some(&anywhere.to_string()))?;
        player.lifecycle.stop().await?;
    }
    Ok(())
}

/// What every KVM can hide: that there is a hypervisor.
async fn what_is_hidden_is_not_seen(stage: Stage) -> Story {
    const HYPERVISOR: u32 = 1 << 31;
    let player = stage.launch("").await?;
    let features = async |cpuid_mask| {
        player.lifecycle.create(&GuestConfig { cpus: 2, cpuid_mask, ..player.config(Act::Spin)? }).await?;
        let control = player.lifecycle.control();
        let shown = control.inspect("vps/1/state/cpuid/0x1/ecx", 0, Rendering::Text).await?;
        let digits = shown.trim_end().strip_prefix("0x").context("a number")?;
        anyhow::Ok(u32::from_str_radix(digits, 16)?)
    };
    let all = features(Vec::new()).await?;
    ensure!(all & HYPERVISOR != 0, "{all:#x}");
    let mask = CpuidMask { leaf: 1, subleaf: Some(0), ecx: HYPERVISOR, ..CpuidMask::default() };
    expect("what is left", features(vec![mask]).await?, all & !HYPERVISOR)
}
