// Stands in for what has no older version in this machine's C and C++ libraries; see old_libraries.py.

#include <ios>
#include <new>
#include <sstream>

extern "C" {

// glibc 2.32 keeps here whether the process has one thread alone. "No" is true of any process, and costs an atomic addition.
char __wrap___libc_single_threaded = 0;

// GCC 11 moved this line into the library.
[[noreturn]] void __wrap__ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}

// GCC 9 gave the two string streams constructors without an argument; the older ones are told how the stream is used.
void __wrap__ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* stream) {
  new (stream) std::stringstream(std::ios_base::in | std::ios_base::out);
}

void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* stream) {
  new (stream) std::ostringstream(std::ios_base::out);
}
}
