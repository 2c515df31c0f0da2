# libgqsa-linked.a: libgqsa, gqsa-run's main, and TVM's runtime from the sources in its wheels. All of
# it is to be linked (--whole-archive): TVM's functions register themselves when a program starts.
get_filename_component(ffi ${GQSA_TVM_FFI_INCLUDE} DIRECTORY)
set(runtime ${GQSA_TVM_SOURCE}/src/runtime)
set(support ${CMAKE_CURRENT_SOURCE_DIR}/tvm_support)

set(sources src/main.cpp $<TARGET_OBJECTS:gqsa_parts>)
foreach(name backtrace container custom_allocator dtype error function init_once object tensor
    extra/env_c_api extra/env_context extra/json_parser extra/json_writer extra/library_module
    extra/library_module_system_lib extra/module)
  list(APPEND tvm_sources ${ffi}/src/ffi/${name}.cc)
endforeach()
foreach(name const_loader_module cpu_device_api device_api file_utils logging memory/memory_manager
    module tensor thread_pool threading_backend workspace_pool
    vm/attn_backend vm/builtin vm/bytecode vm/executable vm/kv_state vm/paged_kv_cache vm/vm)
  list(APPEND tvm_sources ${runtime}/${name}.cc)
endforeach()

add_library(gqsa-linked STATIC ${sources} ${tvm_sources})
target_link_libraries(gqsa-linked PRIVATE gqsa_parts)
target_compile_options(gqsa-linked PRIVATE -ffunction-sections -fdata-sections)
set_source_files_properties(src/main.cpp PROPERTIES COMPILE_OPTIONS "${warnings}")
# Their sources say "../support/..." and "../../support/...": these folders lead there.
set_source_files_properties(${tvm_sources} PROPERTIES
  COMPILE_OPTIONS "-w"
  INCLUDE_DIRECTORIES
    "${support};${support}/tvm;${support}/tvm/support;${GQSA_TVM_SOURCE}/include"
  COMPILE_DEFINITIONS
    "TVM_FFI_CMAKE_LITTLE_ENDIAN=1;TVM_FFI_USE_LIBBACKTRACE=0;TVM_FFI_BACKTRACE_ON_SEGFAULT=0")

# The archives that a program links, in one folder.
set_target_properties(gqsa-linked PROPERTIES ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/linked)
foreach(library ${PCRE2_LIBRARY} ${UTF8PROC_LIBRARY})
  if(TARGET ${library})
    set_target_properties(${library} PROPERTIES
      ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/linked)
    add_dependencies(gqsa-linked ${library})
  endif()
endforeach()
