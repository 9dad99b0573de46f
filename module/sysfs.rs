// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/pagefusion/`: one file for each knob and each statistic.

use crate::compat;
use crate::control::{for_each_value, Value, CONTROL};
use crate::thread;
use crate::values::Text;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::to_result;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

/// Whether a knob was written.
static CHANGED: Atomic<u32> = Atomic::new(0);

/// Whether a knob was written since the last time.
pub(crate) fn take_changed() -> bool {
    CHANGED.load(Relaxed) != 0 && CHANGED.xchg(0, Relaxed) != 0
}

/// The directory. Dropping it removes it, and waits for those who are reading or writing.
///
/// # Invariants
///
/// The object was made by `kobject_create_and_add` and has [`GROUP`] in it.
pub(crate) struct Directory(NonNull<bindings::kobject>);

// SAFETY: The object is only removed, which any thread may do.
unsafe impl Send for Directory {}
// SAFETY: Nothing can be done with a shared reference.
unsafe impl Sync for Directory {}

impl Directory {
    /// Makes the directory with all its files.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: `kernel_kobj` is set long before modules are loaded and never changes.
        let object = unsafe {
            bindings::kobject_create_and_add(c"pagefusion".as_char_ptr(), bindings::kernel_kobj)
        };
        let object = NonNull::new(object).ok_or(ENOMEM)?;
        // SAFETY: The group is static, and so is all that it points to.
        let made = to_result(unsafe { bindings::sysfs_create_group(object.as_ptr(), &GROUP.0) });
        if let Err(error) = made {
            // SAFETY: The object was made above and is not used any more.
            unsafe { bindings::kobject_put(object.as_ptr()) };
            return Err(error);
        }
        // INVARIANT: Just made, with the group in it.
        Ok(Self(object))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // SAFETY: By the invariants the group is there; removing it waits for its users.
        unsafe { bindings::sysfs_remove_group(self.0.as_ptr(), &GROUP.0) };
        // SAFETY: By the invariants we own this reference.
        unsafe { bindings::kobject_put(self.0.as_ptr()) };
    }
}

/// One file. sysfs gives `raw` to the functions in it, which find the value behind it.
#[repr(C)]
struct Attribute {
    raw: bindings::kobj_attribute,
    value: &'static dyn Value,
}

// SAFETY: Constant, and all that it points to is constant or `Sync`.
unsafe impl Sync for Attribute {}

impl Attribute {
    const fn new(name: &'static CStr, value: &'static dyn Value, is_knob: bool) -> Self {
        let (mode, store): (_, Option<compat::Store>) = if is_knob {
            (0o644, Some(store))
        } else {
            (0o444, None)
        };
        Self {
            raw: compat::kobj_attribute(name, mode, show, store),
            value,
        }
    }
}

/// # Safety
///
/// Called by sysfs with the `raw` of an [`Attribute`] and a page to write to.
unsafe extern "C" fn show(
    _: *mut bindings::kobject,
    attribute: *mut bindings::kobj_attribute,
    buffer: *mut c_char,
) -> isize {
    // SAFETY: By this function's requirements; `raw` is the first field, and attributes are
    // static.
    let attribute = unsafe { &*attribute.cast::<Attribute>() };
    // SAFETY: By this function's requirements the page is ours until we return.
    let page = unsafe { core::slice::from_raw_parts_mut(buffer.cast::<u8>(), PAGE_SIZE) };
    let mut text = Text::new(page);
    match attribute.value.show(&mut text) {
        Ok(()) => text.length() as isize,
        Err(_) => EFBIG.to_errno() as isize,
    }
}

/// # Safety
///
/// Called by sysfs with the `raw` of an [`Attribute`] and the `length` bytes that were written.
unsafe extern "C" fn store(
    _: *mut bindings::kobject,
    attribute: *mut bindings::kobj_attribute,
    buffer: *const c_char,
    length: usize,
) -> isize {
    // SAFETY: As in `show`.
    let attribute = unsafe { &*attribute.cast::<Attribute>() };
    // SAFETY: By this function's requirements.
    let text = unsafe { core::slice::from_raw_parts(buffer.cast::<u8>(), length) };
    // What is longer than a page comes in parts, of which none is what was meant.
    let stored = if length < PAGE_SIZE {
        attribute.value.store(text)
    } else {
        Err(E2BIG)
    };
    match stored {
        Ok(()) => {
            CHANGED.store(1, Relaxed);
            thread::kick();
            length as isize
        }
        Err(error) => error.to_errno() as isize,
    }
}

macro_rules! name {
    ($name:ident) => {
        match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a name has no zero inside"),
        }
    };
}

macro_rules! attributes {
    ([$($knob:ident)*] [$($statistic:ident)*]) => {
        static ATTRIBUTES: &[Attribute] = &[
            $(Attribute::new(name!($knob), &CONTROL.$knob, true),)*
            $(Attribute::new(name!($statistic), &CONTROL.$statistic, false),)*
        ];
    };
}

for_each_value!(attributes);

/// `Sync` wrapper of what is never changed.
#[repr(transparent)]
struct Constant<T>(T);
// SAFETY: The value is constant, and so is all that it points to.
unsafe impl<T> Sync for Constant<T> {}

const COUNT: usize = ATTRIBUTES.len();

static POINTERS: Constant<[*const bindings::attribute; COUNT + 1]> = {
    let mut pointers = [core::ptr::null(); COUNT + 1];
    let mut i = 0;
    while i < COUNT {
        pointers[i] = &raw const ATTRIBUTES[i].raw.attr;
        i += 1;
    }
    Constant(pointers)
};

static GROUP: Constant<bindings::attribute_group> = Constant(bindings::attribute_group {
    name: core::ptr::null(),
    __bindgen_anon_1: bindings::attribute_group__bindgen_ty_1 { is_visible: None },
    is_bin_visible: None,
    bin_size: None,
    __bindgen_anon_2: bindings::attribute_group__bindgen_ty_2 {
        attrs_const: (&raw const POINTERS.0).cast(),
    },
    bin_attrs: core::ptr::null(),
});
