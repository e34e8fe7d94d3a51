//! Files of this host that a user of the control socket may give to a machine: kernels, initial RAM disks, images, devices.
//!
//! The VMM opens them with the rights of hostd. Whoever may create a machine could otherwise read and write every file of the host
//! through its guest, whatever else the rules of access allow. So only root, and the user that hostd runs as, name what they like; all
//! others name what lies below one of `image_dirs`, in folders in which nobody else can put another file in its place later: the path is
//! opened again at every start of the machine.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::access::Actor;

/// A path that may not be given to a machine.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Outside.
    #[error(
        "{actor} may not give {path} to a machine: it is below none of this host's `image_dirs`; put it there, or ask its operator to name the folder in the configuration"
    )]
    Outside {
        /// Who asked.
        actor: String,
        /// What for.
        path: PathBuf,
    },
    /// By way of links.
    #[error("{path} leads over a link or `..`, which could lead elsewhere tomorrow: write {real} instead")]
    Link {
        /// What was asked for.
        path: PathBuf,
        /// Where it leads.
        real: PathBuf,
    },
    /// A folder that others can write.
    #[error(
        "{path} may not be given to a machine: others than root can write to {folder} and put another file there; its owner has to be root, and nobody else may write to it (chown root, chmod go-w)"
    )]
    Loose {
        /// What was asked for.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// Not there.
    #[error("cannot look at {path}: {source}; give a file on this host")]
    Missing {
        /// What was asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Whether `actor` may give the file `path` to a machine, where `folders` are `image_dirs`.
///
/// # Errors
///
/// [`ImageError`] with the remedy.
pub fn check(actor: &Actor, path: &Path, folders: &[PathBuf]) -> Result<(), ImageError> {
    let own = nix::unistd::geteuid().as_raw();
    match actor {
        Actor::User { uid, .. } if *uid == 0 || *uid == own => Ok(()),
        _ => below(actor, path, folders, |folder| is_tight(folder, own)),
    }
}

fn below(
    actor: &Actor,
    path: &Path,
    folders: &[PathBuf],
    tight: impl Fn(&Path) -> io::Result<bool>,
) -> Result<(), ImageError> {
    let outside = || ImageError::Outside { actor: actor.to_string(), path: path.to_owned() };
    let missing = |source| ImageError::Missing { path: path.to_owned(), source };
    // Before anything is looked at: whether a file is there is nothing that everybody may find out.
    if !folders.iter().any(|folder| path.starts_with(folder)) {
        return Err(outside());
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(outside()) };
    let real = parent.canonicalize().map_err(missing)?;
    // The last part may be a link, such as /dev/mapper/vm1: it is root who made it there.
    if real != parent {
        let inside = folders.iter().any(|folder| real.starts_with(folder));
        return Err(if inside { ImageError::Link { path: path.to_owned(), real: real.join(name) } } else { outside() });
    }
    for folder in parent.ancestors() {
        if !tight(folder).map_err(missing)? {
            return Err(ImageError::Loose { path: path.to_owned(), folder: folder.to_owned() });
        }
    }
    Ok(())
}

/// Whether only root, or `own`, can change what is in a folder.
fn is_tight(folder: &Path, own: u32) -> io::Result<bool> {
    let metadata = folder.symlink_metadata()?;
    Ok((metadata.uid() == 0 || metadata.uid() == own) && metadata.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const USER: Actor = Actor::User { uid: 1000, operator: true };

    #[test]
    fn root_and_hostds_own_user_name_what_they_like() {
        let own = nix::unistd::geteuid().as_raw();
        for uid in [0, own] {
            let actor = Actor::User { uid, operator: true };
            assert!(check(&actor, Path::new("/etc/shadow"), &[]).is_ok());
        }
        let other = Actor::User { uid: own.wrapping_add(1).max(1), operator: true };
        assert!(matches!(check(&other, Path::new("/etc/shadow"), &[]), Err(ImageError::Outside { .. })));
        assert!(matches!(check(&Actor::Planner, Path::new("/etc/shadow"), &[]), Err(ImageError::Outside { .. })));
    }

    #[test]
    fn others_name_what_lies_in_the_folders_and_cannot_be_changed_behind_us() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        let (images, secret) = (place.join("images"), place.join("secret"));
        std::fs::create_dir_all(images.join("web")).unwrap();
        std::fs::write(images.join("web/a.raw"), "x").unwrap();
        std::fs::write(&secret, "x").unwrap();
        symlink(&secret, images.join("by-root")).unwrap();
        symlink(images.join("web"), images.join("alias")).unwrap();
        symlink(&place, images.join("out")).unwrap();
        let folders = [images.clone()];
        let ask = |path: PathBuf| below(&USER, &path, &folders, |_| Ok(true));
        assert!(ask(images.join("web/a.raw")).is_ok());
        assert!(ask(images.join("by-root")).is_ok(), "a link that root made, as in /dev/mapper");
        assert!(matches!(ask(secret.clone()), Err(ImageError::Outside { .. })));
        assert!(matches!(ask(images.join("../secret")), Err(ImageError::Outside { .. })));
        assert!(matches!(ask(images.join("out/secret")), Err(ImageError::Outside { .. })));
        assert!(matches!(ask(place.join("images2/a.raw")), Err(ImageError::Outside { .. })), "only begins alike");
        assert!(matches!(ask(images.join("none/a.raw")), Err(ImageError::Missing { .. })));
        assert!(matches!(ask("/".into()), Err(ImageError::Outside { .. })));
        let Err(ImageError::Link { real, .. }) = ask(images.join("alias/a.raw")) else { panic!("a link on the way") };
        assert_eq!(real, images.join("web/a.raw"));
        // Any of the folders on the way, also above the one that is named.
        for loose in [images.join("web"), images.clone(), place.clone(), "/".into()] {
            let refused = below(&USER, &images.join("web/a.raw"), &folders, |folder| Ok(folder != loose));
            assert!(matches!(refused, Err(ImageError::Loose { folder, .. }) if folder == loose));
        }
    }

    #[test]
    fn a_folder_is_tight_if_nobody_else_can_write_to_it() {
        let place = tempfile::tempdir().unwrap();
        let own = nix::unistd::geteuid().as_raw();
        for (mode, tight) in [(0o755, true), (0o700, true), (0o775, false), (0o757, false), (0o1777, false)] {
            std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_tight(place.path(), own).unwrap(), tight, "{mode:o}");
        }
        assert!(!is_tight(Path::new("/tmp"), own).unwrap());
        assert!(is_tight(&place.path().join("none"), own).is_err());
    }
}
