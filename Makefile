# SPDX-License-Identifier: GPL-2.0

KDIR ?= /lib/modules/$(shell uname -r)/build
RUSTFMT ?= rustfmt

modules:
	$(MAKE) -C $(KDIR) M=$(CURDIR) modules

modules_install install: modules
	$(MAKE) -C $(KDIR) M=$(CURDIR) modules_install

clean:
	$(MAKE) -C $(KDIR) M=$(CURDIR) clean

check:
	$(RUSTFMT) --check --edition 2021 module/main.rs
	$(MAKE) -C $(KDIR) M=$(CURDIR) CLIPPY=1 modules

.PHONY: modules modules_install install clean check
