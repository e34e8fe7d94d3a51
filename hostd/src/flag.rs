//! Flags that many tasks wait for.

use tokio::sync::watch;

/// Returns once the daemon is to stop.
pub async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the daemon is gone altogether.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Returns once the flag is up; never if nobody can raise it any more.
pub async fn wait_true(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|value| *value).await.is_err() {
        std::future::pending::<()>().await;
    }
}
