//! Reads recorded traces: wide CSV, plain or gzip, and lists of pools.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use predictor::evaluate::{Series, Trace};
use predictor::sample::plausible;
use serde::Deserialize;

use super::super::Failure;
use crate::machine::chain;

/// The largest trace that is read, in cells: 500 machines for a year of five minutes.
pub(super) const MOST_CELLS: usize = 60_000_000;
/// The longest line: 500,000 machines or so.
const LONGEST_LINE: u64 = 8 << 20;
/// The largest trace in bytes, unpacked: a small gzip file can hold empty lines without end.
const LONGEST_TRACE: u64 = 8 << 30;
/// Seconds between samples that are taken for a trace and not for a slip.
const PERIODS_S: std::ops::RangeInclusive<f64> = 1e-3..=1e8;
/// The largest list of pools in bytes.
const LONGEST_LIST: u64 = 64 << 20;

pub(in super::super) fn wrong(path: &Path, what: &dyn std::fmt::Display) -> Failure {
    Failure::Other(format!("{}: {what}", path.display()))
}

/// A reader of a file that may be gzipped, which its first bytes tell and not its name.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>, Failure> {
    let told = |error: &std::io::Error| wrong(path, &chain(error));
    let mut file = File::open(path).map_err(|error| told(&error))?;
    let mut magic = Vec::new();
    (&mut file).take(2).read_to_end(&mut magic).map_err(|error| told(&error))?;
    file.seek(SeekFrom::Start(0)).map_err(|error| told(&error))?;
    Ok(if magic == [0x1f, 0x8b] {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file).take(LONGEST_TRACE)))
    } else {
        Box::new(BufReader::new(file.take(LONGEST_TRACE)))
    })
}

/// The next line without its end; `None` after the last.
pub(super) fn line(reader: &mut dyn BufRead) -> Result<Option<String>, String> {
    let mut bytes = Vec::new();
    reader.take(LONGEST_LINE).read_until(b'\n', &mut bytes).map_err(|error| chain(&error))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() as u64 == LONGEST_LINE && bytes.last() != Some(&b'\n') {
        return Err(format!("a line has more than {LONGEST_LINE} bytes: this is no CSV"));
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is not text in UTF-8".to_owned())?;
    Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned()))
}

/// Reads a wide CSV: a first column of seconds, then one column a machine; an empty cell where nothing was measured.
pub(in super::super) fn wide(path: &Path) -> Result<Trace, Failure> {
    parse(&mut *open(path)?).map_err(|what| wrong(path, &what))
}

fn parse(reader: &mut dyn BufRead) -> Result<Trace, String> {
    let header = line(reader)?.ok_or("it is empty: a header with the machines' names is needed")?;
    let names: Vec<String> = header.split(',').skip(1).map(|name| name.trim().to_owned()).collect();
    if names.is_empty() {
        return Err("its header names no machine: expected `unix_seconds,<machine>,...`".to_owned());
    }
    let mut rows: Vec<(f64, Vec<f32>)> = Vec::new();
    let mut number = 1;
    while let Some(line) = line(reader)? {
        number += 1;
        if line.trim().is_empty() {
            continue;
        }
        let mut cells = line.split(',');
        let time = cells.next().and_then(|cell| cell.trim().parse::<f64>().ok()).filter(|time| time.is_finite());
        let time = time.ok_or_else(|| format!("line {number} does not start with a time in seconds"))?;
        let values: Vec<f32> = cells.map(|cell| cell.trim().parse().unwrap_or(f32::NAN)).collect();
        if values.len() != names.len() {
            return Err(format!("line {number} has {} values and the header {} machines", values.len(), names.len()));
        }
        if (rows.len() + 1) * names.len() > MOST_CELLS {
            return Err(format!("it has more than {MOST_CELLS} cells: split it"));
        }
        rows.push((time, values));
    }
    on_a_grid(names, &rows)
}

/// Puts rows at their place in time, so that a row that is missing is a gap and not a shorter time.
fn on_a_grid(names: Vec<String>, rows: &[(f64, Vec<f32>)]) -> Result<Trace, String> {
    let times: Vec<f64> = rows.iter().map(|(time, _)| *time).collect();
    let (period_s, steps) = grid(&times, names.len())?;
    let mut columns: Vec<Series> = vec![vec![None; steps]; names.len()];
    for (time, values) in rows {
        let place = ((time - times[0]) / period_s).round() as usize;
        for (column, value) in columns.iter_mut().zip(values) {
            // A trace of resources: what no meter can give (infinite, negative) is a gap too.
            column[place] = plausible(Some(f64::from(*value)));
        }
    }
    Ok(Trace { period_s, names, columns })
}

/// The period of ascending times, and how many periods they cover.
pub(super) fn grid(times: &[f64], columns: usize) -> Result<(f64, usize), String> {
    if let Some(row) = times.windows(2).position(|pair| pair[1] <= pair[0]) {
        return Err(format!("its times do not grow: {} comes after {}", times[row + 1], times[row]));
    }
    let mut steps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_by(f64::total_cmp);
    let period_s = *steps.get(steps.len() / 2).ok_or("it has fewer than two rows")?;
    if !PERIODS_S.contains(&period_s) {
        return Err(format!("its rows are {period_s} seconds apart: give the first column in seconds"));
    }
    let covered = (times[times.len() - 1] - times[0]) / period_s + 1.0;
    if covered.round() * columns as f64 > MOST_CELLS as f64 {
        return Err(format!("with its gaps it has more than {MOST_CELLS} cells: split it"));
    }
    Ok((period_s, covered.round() as usize))
}

#[derive(Deserialize)]
struct PoolsFile {
    pools: Vec<Vec<String>>,
}

/// Reads `{"pools": [["vm1", ...], ...]}`.
pub(in super::super) fn pools(path: &Path) -> Result<Vec<Vec<String>>, Failure> {
    let mut text = String::new();
    open(path)?.take(LONGEST_LIST).read_to_string(&mut text).map_err(|error| wrong(path, &chain(&error)))?;
    let expected =
        |error: serde_json::Error| wrong(path, &format!("{error}: expected {{\"pools\": [[\"machine\", ...], ...]}}"));
    Ok(serde_json::from_str::<PoolsFile>(&text).map_err(expected)?.pools)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(text: &str) -> Result<Trace, String> {
        parse(&mut text.as_bytes())
    }

    #[test]
    fn gaps_in_cells_and_in_time_are_gaps() {
        let trace = read("t,a,b\n0,1,\n300,2,5\n600,3,6\n1200,x,7\n").unwrap();
        assert_eq!((trace.period_s, trace.steps()), (300.0, 5));
        assert_eq!(trace.columns[0], [Some(1.0), Some(2.0), Some(3.0), None, None]);
        assert_eq!(trace.column("b").unwrap(), &[None, Some(5.0), Some(6.0), None, Some(7.0)]);
        assert!(trace.column("c").is_none());
    }

    #[test]
    fn what_no_meter_gives_is_a_gap() {
        let trace = read("t,a\n0,1\n1,inf\n2,-3\n3,NaN\n4,1e39\n5,2\n").unwrap();
        assert_eq!(trace.columns[0], [Some(1.0), None, None, None, None, Some(2.0)]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("", "empty"),
            ("t\n", "no machine"),
            ("t,a\n0,1,2\n", "line 2 has 2 values"),
            ("t,a\nx,1\n", "line 2"),
            ("t,a\n5,1\n5,1\n6,1\n", "do not grow"),
            ("t,a\n0,1\n", "fewer than two"),
            ("t,a\n0,1\n1,1\n2,1\n1e12,1\n", "gaps"),
            ("t,a\n-1e308,1\n1e308,1\n", "seconds apart"),
            ("t,a\n0,1\n5e-324,1\n", "seconds apart"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn gzip_is_told_by_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.csv");
        let mut packed = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        packed.write_all(b"t,a\n0,1\n10,2\n").unwrap();
        packed.finish().unwrap();
        assert_eq!(wide(&path).unwrap().columns[0], [Some(1.0), Some(2.0)]);
        let missing = wide(&folder.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
    }
}
