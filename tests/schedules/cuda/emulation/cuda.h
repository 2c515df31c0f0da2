// Stands where the generated code includes NVIDIA's header: emulation.h has all it needs.
#pragma once
