// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/pagefusion/`: one file for each knob and each statistic.

use crate::control::{for_each_number, CONTROL};
use crate::thread;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;

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

/// # Safety
///
/// `buffer` must be a page that sysfs has given to a `show` function.
unsafe fn emit(buffer: *mut c_char, value: u64) -> isize {
    // SAFETY: By this function's requirements; the format takes one `u64`.
    let length = unsafe { bindings::sysfs_emit(buffer, c"%llu\n".as_char_ptr(), value) };
    length as isize
}

/// # Safety
///
/// `buffer` must be the string that sysfs has given to a `store` function.
unsafe fn parse(buffer: *const c_char) -> Result<u64> {
    let mut value = 0;
    // SAFETY: sysfs ends what was written with a zero; by this function's requirements.
    match unsafe { bindings::kstrtoull(buffer, 10, &mut value) } {
        0 => Ok(value),
        _ => Err(EINVAL),
    }
}

/// `Sync` wrapper of what is never changed.
#[repr(transparent)]
struct Constant<T>(T);
// SAFETY: The value is constant, and so is all that it points to.
unsafe impl<T> Sync for Constant<T> {}

type Show = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *mut c_char,
) -> isize;
type Store = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *const c_char,
    usize,
) -> isize;

const fn attribute(
    name: &'static CStr,
    show: Show,
    store: Option<Store>,
) -> Constant<bindings::kobj_attribute> {
    let mode = if store.is_some() { 0o644 } else { 0o444 };
    Constant(bindings::kobj_attribute {
        attr: bindings::attribute {
            name: name.as_ptr().cast(),
            mode,
        },
        __bindgen_anon_1: bindings::kobj_attribute__bindgen_ty_1 { show: Some(show) },
        __bindgen_anon_2: bindings::kobj_attribute__bindgen_ty_2 { store },
    })
}

macro_rules! attributes {
    ([$($knob:ident)*] [$($statistic:ident)*]) => {
        $(mod $knob {
            use super::*;

            /// # Safety
            ///
            /// Called by sysfs with a page.
            pub(super) unsafe extern "C" fn show(
                _: *mut bindings::kobject,
                _: *mut bindings::kobj_attribute,
                buffer: *mut c_char,
            ) -> isize {
                // SAFETY: sysfs gives us the page.
                unsafe { emit(buffer, CONTROL.$knob.get()) }
            }

            /// # Safety
            ///
            /// Called by sysfs with what was written, ended by a zero.
            pub(super) unsafe extern "C" fn store(
                _: *mut bindings::kobject,
                _: *mut bindings::kobj_attribute,
                buffer: *const c_char,
                length: usize,
            ) -> isize {
                // SAFETY: sysfs gives us the string.
                match unsafe { parse(buffer) }.and_then(|value| CONTROL.$knob.set(value)) {
                    Ok(()) => {
                        thread::kick();
                        length as isize
                    }
                    Err(error) => error.to_errno() as isize,
                }
            }
        })*
        $(mod $statistic {
            use super::*;

            /// # Safety
            ///
            /// Called by sysfs with a page.
            pub(super) unsafe extern "C" fn show(
                _: *mut bindings::kobject,
                _: *mut bindings::kobj_attribute,
                buffer: *mut c_char,
            ) -> isize {
                // SAFETY: sysfs gives us the page.
                unsafe { emit(buffer, CONTROL.$statistic.get()) }
            }
        })*

        static ATTRIBUTES: &[Constant<bindings::kobj_attribute>] = &[
            $(attribute(name!($knob), $knob::show, Some($knob::store)),)*
            $(attribute(name!($statistic), $statistic::show, None),)*
        ];
    };
}

macro_rules! name {
    ($name:ident) => {
        match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a name has no zero inside"),
        }
    };
}

for_each_number!(attributes);

const COUNT: usize = ATTRIBUTES.len();

static POINTERS: Constant<[*const bindings::attribute; COUNT + 1]> = {
    let mut pointers = [core::ptr::null(); COUNT + 1];
    let mut i = 0;
    while i < COUNT {
        pointers[i] = &raw const ATTRIBUTES[i].0.attr;
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
