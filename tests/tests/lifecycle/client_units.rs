//! State units that a client implements, among those of its guest.

use guest_client::{Rendering, UnitConfig};
use guest_schema::{GuestConfig, GuestError};
use guest_tests::stage::{Act, Stage, Story, expect, refusal, refused, says};
use guest_tests::unit::NotingUnit;

pub async fn a_clients_units_move_with_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    let units = vec![
        UnitConfig { depends_on: vec!["serial".into()], ..unit.part("backup") },
        UnitConfig { depends_on: vec!["backup".into()], ..unit.part("second") },
        UnitConfig { depends_on: vec!["vps".into()], ..unit.part("monitor") },
    ];
    let running = player.play_config(&GuestConfig { units, ..player.config(Act::Spin)? }).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let asked = |words: &str| -> Vec<String> { words.split(", ").map(str::to_owned).collect() };
    // The guest speaks before what needs the VPs has started; a pause waits for that.
    control.pause().await?;
    let started_and_paused =
        "backup start, second start, monitor start, monitor stop, second stop, backup stop";
    expect("run and pause", unit.take_notes(), asked(started_and_paused))?;
    control.reset().await?;
    expect("reset", unit.take_notes(), asked("backup reset, second reset, monitor reset"))?;
    control.resume().await?;
    expect("resume", unit.take_notes(), asked("backup start, second start, monitor start"))?;
    let graph = observer.unit_graph().await?;
    let needs = |name: &str| -> Vec<String> {
        graph.iter().find(|unit| unit.name == name).map(|unit| unit.depends_on.clone()).unwrap_or_default()
    };
    expect("backup", needs("backup"), asked("serial"))?;
    expect("monitor", needs("monitor"), asked("vps"))?;
    let vps = needs("vps");
    expect("the VPs", ["backup", "second"].map(|name| vps.iter().any(|other| other == name)), [true; 2])?;
    let shown = observer.inspect("units/second/unit/id", 0, Rendering::Text).await?;
    expect("what it shows", &shown[..], "second\n")?;
    player.lifecycle.stop().await?;
    expect("stop", unit.take_notes(), asked("monitor stop, second stop, backup stop"))?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn a_clients_unit_that_refuses_to_start_fails_the_run(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    unit.refuse("start");
    let config = GuestConfig { units: vec![unit.part("backup")], ..player.config(Act::Spin)? };
    player.lifecycle.create(&config).await?;
    let (code, detail) = refused(player.lifecycle.run().await)?;
    expect("code", code, GuestError::DeviceStartFailure)?;
    says(&detail, "backup does not start today")
}

pub async fn faults_of_a_clients_units_are_listed(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    let create = async |units| {
        let config = GuestConfig { units, ..player.config(Act::Spin)? };
        let (code, detail) = refused(player.lifecycle.create(&config).await)?;
        expect(&detail, code, GuestError::BadConfig)?;
        anyhow::Ok(detail)
    };
    let detail =
        create(vec![unit.part("a b"), UnitConfig { deadline_ms: 0, ..unit.part("late") }, unit.part("late")])
            .await?;
    for words in
        ["units[0].id: \"a b\" is not", "units[1].deadlineMs: 0", "units[2].id: \"late\" is there before"]
    {
        says(&detail, words)?;
    }
    let detail = create(vec![
        unit.part("serial"),
        UnitConfig { depends_on: vec!["nobody".into()], ..unit.part("one") },
        UnitConfig { depends_on: vec!["three".into()], ..unit.part("two") },
        unit.part("three"),
    ])
    .await?;
    for words in ["units[0].id: ", "units[1].dependsOn: there is no unit \"nobody\"", "units[2].dependsOn: "]
    {
        says(&detail, words)?;
    }
    // Nothing of a refused guest is left in the way of the next.
    let config = GuestConfig { units: vec![unit.part("serial-2")], ..player.config(Act::Spin)? };
    player.lifecycle.create(&config).await?;
    expect("asked", unit.take_notes(), Vec::new())
}

pub async fn a_unit_joins_a_guest_at_any_time(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let control = player.lifecycle.control();
    control.add_unit(&unit.part("early")).await?;
    expect("created", unit.take_notes(), Vec::new())?;
    let run = player.lifecycle.run();
    // Waits for the start of the others, and is started then.
    control.add_unit(&UnitConfig { depends_on: vec!["early".into()], ..unit.part("late") }).await?;
    expect("running", unit.take_notes(), vec!["early start".to_owned(), "late start".to_owned()])?;
    let again = control.add_unit(&unit.part("late")).await;
    let (code, detail) = refused(again)?;
    expect(&detail, code, GuestError::BadConfig)?;
    let other = NotingUnit::default();
    other.refuse("start");
    let refusing = control.add_unit(&other.part("refusing")).await;
    expect("one that does not start", refusal(refusing)?, GuestError::DeviceStartFailure)?;
    control.pause().await?;
    expect("paused", unit.take_notes(), vec!["late stop".to_owned(), "early stop".to_owned()])?;
    control.add_unit(&unit.part("last")).await?;
    expect("added while paused", unit.take_notes(), Vec::new())?;
    control.resume().await?;
    let mut started = unit.take_notes();
    started.sort();
    expect("resumed", started, ["early start", "last start", "late start"].map(str::to_owned).to_vec())?;
    let names: Vec<String> =
        control.observer().unit_graph().await?.into_iter().map(|unit| unit.name).collect();
    expect("the refusing one", names.iter().any(|name| name == "refusing"), false)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(run.await)?, GuestError::ControllerForcedHalt)?;
    let after = control.add_unit(&unit.part("after")).await;
    expect("after its end", refusal(after)?, GuestError::NotRunning)
}
