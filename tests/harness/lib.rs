//! What the integration tests share: what they require of the machine, hosts with machines on them, and oracles.

pub mod mounts;
pub mod ping;
pub mod require;
pub mod world;

pub use require::{Need, ready};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn no_area_is_forgotten() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).expect("the manifest of this package");
        let listed: BTreeSet<String> = manifest
            .lines()
            .filter_map(|line| line.strip_prefix("path = \"")?.strip_suffix("/main.rs\"").map(str::to_owned))
            .collect();
        let present: BTreeSet<String> = std::fs::read_dir(root)
            .expect("the folder of this package")
            .flatten()
            .filter(|entry| entry.path().join("main.rs").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        assert_eq!(
            present, listed,
            "every folder with a main.rs must be a [[test]] in tests/Cargo.toml, and the other way round"
        );
    }

    #[test]
    fn no_file_of_an_area_is_forgotten() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for area in std::fs::read_dir(root).expect("the folder of this package").flatten() {
            let Ok(main) = std::fs::read_to_string(area.path().join("main.rs")) else { continue };
            for file in std::fs::read_dir(area.path()).expect("an area").flatten() {
                let name = file.file_name().into_string().unwrap_or_default();
                let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "main") else { continue };
                let declared = main.lines().any(|line| line.trim() == format!("mod {module};"));
                assert!(declared, "{} is not a module of its area's main.rs", file.path().display());
            }
        }
    }
}
