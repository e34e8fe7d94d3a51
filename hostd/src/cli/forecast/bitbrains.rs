//! Reads the format of the Bitbrains traces (GWA-T-12; Shen, van Beek and Iosup, `CCGrid` 2015): a folder with one CSV a machine,
//! cells separated by `;` and tabs, eleven columns with names and units in the header.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use predictor::evaluate::{Series, Trace};
use predictor::sample::plausible;

use super::super::Failure;
use super::trace::{MOST_CELLS, line, open, wrong};
use crate::machine::chain;

/// The columns that are used.
const TIME: &str = "timestamp [ms]";
const CPU_PERCENT: &str = "cpu usage [%]";
const CPU_MHZ: &str = "cpu usage [mhz]";
const MEMORY_KB: &str = "memory usage [kb]";
const MEMORY_OF_KB: &str = "memory capacity provisioned [kb]";
const WANTED: [&str; 5] = [TIME, CPU_PERCENT, CPU_MHZ, MEMORY_KB, MEMORY_OF_KB];

/// The latest time in seconds that is taken for one: what is later would overflow differences.
const LATEST_S: f64 = 1e13;

/// What a folder of machines gives.
pub(super) struct Machines {
    /// CPU in per cent of what each machine has.
    pub(super) cpu: Trace,
    /// Memory in per cent of what each machine has.
    pub(super) memory: Trace,
    /// CPU in MHz: what can be summed over machines.
    pub(super) cpu_mhz: Trace,
}

/// One machine: seconds, and CPU in per cent, in MHz, memory in per cent.
type Rows = BTreeMap<i64, [f32; 3]>;

/// Reads all CSVs of a folder.
pub(super) fn folder(path: &Path) -> Result<Machines, Failure> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(|error| wrong(path, &chain(&error)))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".csv") || name.ends_with(".csv.gz")
        })
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(wrong(path, &"it has no .csv file: give the folder with one file a machine"));
    }
    let mut machines = Vec::new();
    let mut left = MOST_CELLS;
    for file in &files {
        let rows = machine(file, left)?;
        left -= rows.len();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        machines.push((format!("vm{}", name.split('.').next().unwrap_or_default()), rows));
    }
    join(machines).map_err(|what| wrong(path, &what))
}

fn machine(path: &Path, most: usize) -> Result<Rows, Failure> {
    parse(&mut *open(path)?, most).map_err(|what| wrong(path, &what))
}

/// `most` rows are read at most, over all files of a folder: a small gzip file can hold rows without end.
fn parse(reader: &mut dyn std::io::BufRead, most: usize) -> Result<Rows, String> {
    let cells = |line: &str| -> Vec<String> { line.split(';').map(|cell| cell.trim().to_lowercase()).collect() };
    let header = cells(&line(reader)?.ok_or("it is empty")?);
    let mut places = [0; WANTED.len()];
    for (place, wanted) in places.iter_mut().zip(WANTED) {
        *place = header
            .iter()
            .position(|name| name == wanted)
            .ok_or_else(|| format!("its header has no column {wanted:?}: this is not the Bitbrains format"))?;
    }
    let mut rows = Rows::new();
    while let Some(line) = line(reader)? {
        let cells = cells(&line);
        let value =
            |place: usize| cells.get(place).and_then(|cell| cell.parse::<f64>().ok()).filter(|value| value.is_finite());
        let [time, percent, mhz, used, of] = places.map(value);
        // The header says milliseconds, the files have seconds.
        let time = time.map(|time| if time > 1e11 { time / 1_000.0 } else { time });
        let Some(time) = time.filter(|time| (0.0..=LATEST_S).contains(time)) else { continue };
        if rows.len() >= most {
            return Err(format!("the folder has more than {MOST_CELLS} rows: use a part of it"));
        }
        let memory = match (used, of) {
            (Some(used), Some(of)) if of > 0.0 => Some(100.0 * used / of),
            _ => None,
        };
        let values = [percent, mhz, memory].map(|value| plausible(value).map_or(f32::NAN, |value| value as f32));
        rows.insert(time as i64, values);
    }
    Ok(rows)
}

/// Puts machines, whose times differ, on one grid of the period that most of them have.
fn join(machines: Vec<(String, Rows)>) -> Result<Machines, String> {
    let mut steps: Vec<i64> = machines
        .iter()
        .flat_map(|(_, rows)| rows.keys().zip(rows.keys().skip(1)).map(|(a, b)| b - a))
        .filter(|step| *step > 0)
        .collect();
    steps.sort_unstable();
    let period = *steps.get(steps.len() / 2).ok_or("no machine has two rows")?;
    let first = machines.iter().filter_map(|(_, rows)| Some(*rows.first_key_value()?.0)).min().unwrap_or(0);
    let last = machines.iter().filter_map(|(_, rows)| Some(*rows.last_key_value()?.0)).max().unwrap_or(0);
    let count = usize::try_from((last - first) / period + 1).unwrap_or(usize::MAX);
    if count.saturating_mul(machines.len()) > MOST_CELLS {
        return Err(format!("with its gaps it has more than {MOST_CELLS} cells: use a part of it"));
    }
    let mut columns: [Vec<Series>; 3] = std::array::from_fn(|_| Vec::new());
    let mut names = Vec::new();
    for (name, rows) in machines {
        names.push(name);
        for (which, columns) in columns.iter_mut().enumerate() {
            let mut column = vec![None; count];
            for (time, values) in &rows {
                let place = usize::try_from((time - first) / period).unwrap_or(0);
                if !values[which].is_nan() {
                    column[place] = Some(f64::from(values[which]));
                }
            }
            columns.push(column);
        }
    }
    let trace = |columns: Vec<Series>| Trace { period_s: period as f64, names: names.clone(), columns };
    let [cpu, cpu_mhz, memory] = columns;
    Ok(Machines { cpu: trace(cpu), memory: trace(memory), cpu_mhz: trace(cpu_mhz) })
}

#[cfg(test)]
mod tests {
    const HEADER: &str = "Timestamp [ms];\tCPU cores;\tCPU capacity provisioned [MHZ];\tCPU usage [MHZ];\tCPU usage [%];\t\
        Memory capacity provisioned [KB];\tMemory usage [KB];\tDisk read throughput [KB/s]\n";

    #[test]
    fn machines_are_put_on_one_grid() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "1.csv",
            format!(
                "{HEADER}1000;\t4;\t8000;\t800;\t10;\t2000;\t500;\t0\n1300;\t4;\t8000;\t1600;\t20;\t2000;\t1000;\t0\n"
            ),
        );
        write("2.csv", format!("{HEADER}9000000000000000;\t4;\t8000;\t800;\t10;\t2000;\t500;\t0\n"));
        write("notes.txt", "nothing".into());
        assert!(super::folder(folder.path()).is_err_and(|error| error.to_string().contains("cells")), "years apart");
        write("2.csv", format!("{HEADER}1610;\t4;\t8000;\t80;\t1;\t2000;\t200;\t0\n\n"));
        let machines = super::folder(folder.path()).unwrap();
        assert_eq!(machines.cpu.names, ["vm1", "vm2"]);
        assert_eq!(machines.cpu.columns[0], [Some(10.0), Some(20.0), None]);
        assert_eq!(machines.memory.columns[0], [Some(25.0), Some(50.0), None]);
        assert_eq!(machines.cpu_mhz.columns[1], [None, None, Some(80.0)]);
        write("2.csv", format!("{HEADER}-1e300;\t4;\t8000;\t80;\t1;\t2000;\t200;\t0\n1e300;\t4;\t8000;\t80;\t1\n"));
        assert_eq!(super::folder(folder.path()).unwrap().cpu.columns[1], [None, None], "no times at all");
        let rows: String = (0..4).map(|t| format!("{t};\t4;\t8000;\t80;\t-1;\t2000;\t200;\t0\n")).collect();
        let parsed = |most| super::parse(&mut format!("{HEADER}{rows}").as_bytes(), most);
        assert!(parsed(4).unwrap()[&0][0].is_nan(), "less than nothing was not measured");
        assert!(parsed(3).is_err_and(|error| error.contains("use a part")));
        write("3.csv", "a,b\n1,2\n".into());
        assert!(super::folder(folder.path()).is_err_and(|error| error.to_string().contains("Bitbrains format")));
    }
}
