# Helpers for building an interface package against ROS 2 wheels inside a virtual environment.

# ftkd_drop_missing_include_folders()
#
# The exported targets of the wheels contain include folders of the machine that built them. CMake fails to
# generate if an imported target has an include folder that does not exist, so this function removes those
# folders from the imported targets. Call it after the last find_package; no file is changed.
function(ftkd_drop_missing_include_folders)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(folders "${target}" INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT folders)
      continue()
    endif()
    set(existing "")
    foreach(folder IN LISTS folders)
      if(folder MATCHES "^\\$<" OR EXISTS "${folder}")
        list(APPEND existing "${folder}")
      endif()
    endforeach()
    set_target_properties("${target}" PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${existing}")
  endforeach()
endfunction()

# ftkd_keep_python_generators()
#
# rclpy with FastDDS needs the C structs, their FastDDS serialisation, the introspection type support (without
# it FastDDS cannot describe the type and leaves an error state, which the next type reports) and the Python
# classes. The C++ classes are skipped, because they triple the build time and are never loaded.
# Call this after the last find_package and before rosidl_generate_interfaces.
macro(ftkd_keep_python_generators)
  list(FILTER AMENT_EXTENSIONS_rosidl_generate_idl_interfaces EXCLUDE REGEX
    "^(rosidl_generator_cpp|rosidl_typesupport_cpp|rosidl_typesupport_fastrtps_cpp|rosidl_typesupport_introspection_cpp):")
endmacro()
