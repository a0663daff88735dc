//! The commands about guests that run already: ps, stop, wait, pause, resume, reset, nmi; and info.

use crate::ending::{self, Outcome};
use crate::options::Stop;
use crate::out::Out;
use guest_client::{Control, Exit, GuestInfo, Host};
use serde_json::json;
use std::time::Duration;

/// Lists the guests.
pub async fn ps(host: &Host, json: bool, out: &Out) -> Outcome {
    let guests = host.list().await?;
    let text = if json { as_json(&guests) } else { table(&guests) };
    out.write(text.as_bytes())
}

fn as_json(guests: &[GuestInfo]) -> String {
    let guests: Vec<_> = guests
        .iter()
        .map(|guest| {
            json!({
                "id": guest.id, "phase": guest.phase.name(), "vps": guest.vps, "pid": guest.pid,
                "uptime_us": guest.uptime_us, "proxied": guest.proxied,
            })
        })
        .collect();
    format!("{}\n", json!(guests))
}

fn table(guests: &[GuestInfo]) -> String {
    let mut rows = vec![["ID", "PHASE", "VPS", "PID", "UPTIME"].map(str::to_owned)];
    rows.extend(guests.iter().map(|guest| {
        [
            guest.id.clone(),
            guest.phase.name().to_owned(),
            guest.vps.to_string(),
            guest.pid.to_string(),
            uptime(guest.uptime_us),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    rows.iter().map(|row| line(row, widths)).collect()
}

fn line([id, phase, vps, pid, uptime]: &[String; 5], [a, b, c, d]: [usize; 4]) -> String {
    format!("{id:a$}  {phase:b$}  {vps:>c$}  {pid:>d$}  {uptime}\n")
}

/// A time since the guest ran, as coarse as a reader wants it.
fn uptime(us: u64) -> String {
    let seconds = us / 1_000_000;
    match seconds {
        0 if us == 0 => "-".to_owned(),
        0..60 => format!("{}.{}s", seconds, us / 100_000 % 10),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Tells what the service says of itself.
pub async fn info(host: &Host, json: bool, out: &Out) -> Outcome {
    let info = host.info().await?;
    let text = if json {
        let object = json!({
            "version": info.version, "protocol": info.protocol, "guests": info.guests, "hypervisor": info.hypervisor,
            "warm": info.warm, "prepared": info.prepared,
        });
        format!("{object}\n")
    } else {
        format!(
            "guestd      {}\nprotocol    {}\nguests      {}\nhypervisor  {}\nwarm        {}\nprepared    {}\n",
            info.version, info.protocol, info.guests, info.hypervisor, info.warm, info.prepared
        )
    };
    out.write(text.as_bytes())
}

/// Waits for a guest's end: success if it was clean.
pub async fn wait(host: &Host, id: &str, out: &Out) -> Outcome {
    let found = host.find(id).await?;
    let exit = found.exit.terminated().await?;
    out.write(end(&found.id, &exit).as_bytes())?;
    ending::of_guest(&exit)
}

/// How a guest has ended, as a line, and what it has reported, as another.
pub fn end(id: &str, exit: &Exit) -> String {
    let how = exit.outcome.name();
    let failure = exit.failure().map_or_else(|| exit.detail.clone(), |failure| failure.to_string());
    let reason = if failure.is_empty() { String::new() } else { format!(": {failure}") };
    let panic = ending::panic_of(exit).map_or_else(String::new, |panic| format!("{panic}\n"));
    format!("{id} has ended: {how}{reason}\n{panic}")
}

/// Stops a guest: by force, or as it likes best.
pub async fn stop(host: &Host, stop: &Stop, out: &Out) -> Outcome {
    match stop.graceful {
        true => stop_gracefully(host, &stop.id, stop.timeout, out).await,
        false => Ok(control(host, &stop.id).await?.stop().await?),
    }
}

/// Presses a guest's power button and waits for its end; after the timeout it is stopped by force. Says which it was: success
/// either way, unless the guest fails.
async fn stop_gracefully(host: &Host, id: &str, timeout: Duration, out: &Out) -> Outcome {
    let found = host.find(id).await?;
    // Asked before the button is pressed: a guest may end, and its id be free again, at once.
    let terminated = found.exit.terminated();
    found.control.power_button().await?;
    match tokio::time::timeout(timeout, terminated).await {
        Ok(exit) => {
            let exit = exit?;
            out.write(end(&found.id, &exit).as_bytes())?;
            ending::of_guest(&exit)
        }
        Err(_) => {
            found.control.stop().await?;
            out.write(format!("{} has not ended within {timeout:?}: stopped by force\n", found.id).as_bytes())
        }
    }
}

/// Holds a running guest.
pub async fn pause(host: &Host, id: &str) -> Outcome {
    Ok(control(host, id).await?.pause().await?)
}

/// Lets a paused guest go on.
pub async fn resume(host: &Host, id: &str) -> Outcome {
    Ok(control(host, id).await?.resume().await?)
}

/// Starts a guest anew.
pub async fn reset(host: &Host, id: &str) -> Outcome {
    Ok(control(host, id).await?.reset().await?)
}

/// Sends a guest a non-maskable interrupt.
pub async fn nmi(host: &Host, id: &str) -> Outcome {
    Ok(control(host, id).await?.nmi().await?)
}

async fn control(host: &Host, id: &str) -> Outcome<Control> {
    Ok(host.find(id).await?.control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_client::Phase;

    fn guest(id: &str, uptime_us: u64) -> GuestInfo {
        GuestInfo { id: id.into(), phase: Phase::Running, pid: 4711, uptime_us, vps: 2, proxied: false }
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&[guest("web", 61_000_000), guest("a-longer-id", 0)]);
        let expected = "ID           PHASE    VPS   PID  UPTIME\n\
                        web          running    2  4711  1m 01s\n\
                        a-longer-id  running    2  4711  -\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn uptimes_are_as_coarse_as_they_are_long() {
        let cases = [
            (1, "0.0s"),
            (59_990_000, "59.9s"),
            (3_599_000_000, "59m 59s"),
            (86_399_000_000, "23h 59m"),
            (200_000_000_000, "2d 07h"),
        ];
        for (us, text) in cases {
            assert_eq!(uptime(us), text);
        }
    }

    #[test]
    fn json_has_every_field() {
        let list: serde_json::Value = serde_json::from_str(&as_json(&[guest("web", 5)])).expect("JSON");
        let expected = json!([{
            "id": "web", "phase": "running", "vps": 2, "pid": 4711, "uptime_us": 5, "proxied": false,
        }]);
        assert_eq!(list, expected);
    }
}
