//! Requests that kvm-ioctls has no wrapper for, checked against the numbers and sizes of the kernel's ABI.

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const _: () = assert!(KVMIO == 0xae);
const _: () = assert!(size_of::<kvm_dirty_log>() == 16 && size_of::<kvm_clear_dirty_log>() == 24);
const _: () = assert!(size_of::<kvm_device_attr>() == 24 && size_of::<kvm_bindings::kvm_clock_data>() == 48);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel() {
        assert_eq!((KVM_GET_DIRTY_LOG(), KVM_CLEAR_DIRTY_LOG()), (0x4010_ae42, 0xc018_aec0));
        assert_eq!(KVM_RESET_DIRTY_RINGS(), 0xaec7);
        assert_eq!((KVM_SET_DEVICE_ATTR(), KVM_GET_DEVICE_ATTR()), (0x4018_aee1, 0x4018_aee2));
    }
}
