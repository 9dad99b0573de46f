# Runs inside the guest's root, as its root, when all packages are configured.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

passwd --delete root
echo guest > /etc/hostname
printf '127.0.0.1 localhost guest\n::1 localhost\n' > /etc/hosts
printf '/dev/vda / ext4 errors=remount-ro 0 0\n' > /etc/fstab
printf 'deb http://deb.debian.org/debian trixie main\n' > /etc/apt/sources.list
# Every guest makes its own.
: > /etc/machine-id
rm -f /var/lib/dbus/machine-id

mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n' > /etc/systemd/journald.conf.d/volatile.conf
mkdir -p /etc/systemd/system.conf.d
# Under TCG, and with several guests on two cores, everything may take long.
printf '[Manager]\nDefaultTimeoutStartSec=300s\nDefaultDeviceTimeoutSec=300s\n' > /etc/systemd/system.conf.d/slow.conf

# Emulated, each of the hundred devices that nobody here asks for costs as much as starting a service.
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d
printf '[Service]\nExecStart=\nExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net --subsystem-match=misc\n' \
    > /etc/systemd/system/systemd-udev-trigger.service.d/few.conf

ln -sf /usr/lib/systemd/system/multi-user.target /etc/systemd/system/default.target
systemctl enable nginx.service postgresql.service pagefusion-agent.service pagefusion-python.service
systemctl mask \
    apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer logrotate.timer \
    systemd-networkd-wait-online.service systemd-tmpfiles-clean.timer \
    systemd-firstboot.service systemd-homed-firstboot.service \
    systemd-binfmt.service systemd-pcrphase.service systemd-pcrphase-sysinit.service \
    systemd-hwdb-update.service systemd-update-done.service ldconfig.service \
    systemd-journal-catalog-update.service systemd-machine-id-commit.service \
    systemd-journal-flush.service systemd-random-seed.service systemd-sysusers.service \
    systemd-udev-load-credentials.service systemd-modules-load.service systemd-logind.service \
    modprobe@configfs.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service \
    modprobe@dm_mod.service modprobe@loop.service \
    dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount sys-kernel-config.mount \
    getty.target getty@tty1.service serial-getty@ttyS0.service serial-getty@ttyS1.service \
    console-getty.service

ls /etc/postgresql/*/main/postgresql.conf
