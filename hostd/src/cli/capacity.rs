//! `headroom capacity`: how many hosts the pools need over the next day.

use clap::Args;

use super::Failure;
use super::output::{Output, Table, duration, or_dash, word};
use super::view::quantity;
use crate::api::types::{CapacityAdvice, PoolCapacity};
use crate::client::Client;

/// What risk is accepted.
#[derive(Debug, Args)]
#[command(after_help = "\
For each pool: what it has, and what it needs within a few minutes, within hours and within a day, so that it runs out only with the
accepted risk. The need within a time is the highest use to be expected in it, over what one host gives (the mean of its hosts) up to
the pool's thresholds; the most demanding resource decides. Declared events count with their probability. Forecasts of a day have
steps of five minutes and want about a week of measurements; before that their reserves are wide.

  provision  hosts are missing within the time that it takes to get one (planner.capacity.lead_s): order them now
  release    one host less has been enough for planner.capacity.hold_s: `headroom host drain` on one of them
  keep       neither; ORDER WITHIN says when a host has to be ordered that will be missing later

Examples:
  headroom capacity                 at the configured risk (planner.capacity.risk, 5 % unless set)
  headroom capacity --risk 0.01     hosts that are enough with 99 %; the advice stays that of the configured risk
  headroom capacity --json          for a script that orders hosts")]
pub(super) struct Arguments {
    /// Accepted probability that a pool runs out within each time, 0.0001 to 0.5 [default: planner.capacity.risk].
    #[arg(long, value_name = "SHARE", value_parser = risk)]
    risk: Option<f64>,
}

fn risk(text: &str) -> Result<f64, String> {
    let range = crate::planner::RISKS;
    let said = || format!("give a share from {} to {}, such as 0.05 for 5 %", range.start(), range.end());
    text.parse().ok().filter(|risk| range.contains(risk)).ok_or_else(said)
}

pub(super) async fn run(client: &Client, output: &Output, arguments: &Arguments) -> Result<(), Failure> {
    Ok(output.print(&client.capacity(arguments.risk).await?, |pools| text(pools))?)
}

fn text(pools: &[PoolCapacity]) -> String {
    let mut text = String::new();
    for pool in pools {
        let mut table = Table::new(&["  WITHIN", "HOSTS", "DECIDES", "USE AT THAT RISK"]);
        for need in &pool.needs {
            table.row(vec![
                format!("  {}", duration(need.within_s * 1000.0)),
                format!("{}{}", need.hosts, if need.hosts > pool.hosts { " (missing)" } else { "" }),
                word(need.resource),
                quantity(need.resource, need.use_at_risk),
            ]);
        }
        let order = or_dash(pool.provision_within_s.map(|within_s| match within_s {
            within_s if within_s > 0.0 => duration(within_s * 1000.0),
            _ => "now".to_owned(),
        }));
        let advice = match pool.advice {
            CapacityAdvice::Keep => "keep",
            CapacityAdvice::Provision => "provision",
            CapacityAdvice::Release => "release one",
            CapacityAdvice::Unknown => "not known yet",
        };
        text.push_str(&format!(
            "pool {}  hosts {}  missing {}  order within {order}  advice: {advice}\n  {}\n{}",
            pool.pool,
            pool.hosts,
            pool.missing,
            pool.reason,
            table.text("  nothing was measured yet"),
        ));
        text.push_str(&format!("  at a risk of {} %\n", 100.0 * pool.risk));
    }
    if text.is_empty() { "no pool was measured yet".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Capacity, HostsNeeded, Resource};

    #[test]
    fn the_table_says_what_is_missing_and_until_when_to_order() {
        let need = |within_s, hosts| HostsNeeded { within_s, hosts, resource: Resource::Cpu, use_at_risk: 3.5 };
        let pool = PoolCapacity {
            pool: "a".into(),
            hosts: 2,
            per_host: Capacity::default(),
            risk: 0.05,
            needs: vec![need(300.0, 2), need(7_200.0, 3)],
            missing: 1,
            provision_within_s: Some(0.0),
            advice: CapacityAdvice::Keep,
            reason: "because".into(),
        };
        let said = text(std::slice::from_ref(&pool));
        for part in
            ["pool a  hosts 2  missing 1  order within now", "3 (missing)", "3.50 cores", "because", "risk of 5 %"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(text(&[]).contains("no pool"));
    }

    #[test]
    fn a_risk_is_a_share() {
        assert_eq!(risk("0.05"), Ok(0.05));
        for wrong in ["0", "1", "5 %", "nan", "-0.1", ""] {
            assert!(risk(wrong).is_err_and(|error| error.contains("0.05 for 5 %")), "{wrong}");
        }
    }
}
