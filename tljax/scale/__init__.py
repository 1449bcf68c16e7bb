"""Many devices: rules from named axes to the axes of a mesh, and where each array then lies.

rules    ShardingRules: tensor parallel, data parallel, fully sharded, and sums of these
mesh     making and checking meshes, and the mesh that a model lies on
layout   axes, shape, rules and mesh of one array → its PartitionSpec and bytes per device
table    ShardingTable, which ``model.sharding_table()`` returns
hosts    connecting the processes of several hosts
batch    prompts over the devices of a mesh
"""

from tljax.processes import fetch
from tljax.scale.hosts import connect
from tljax.scale.layout import Placement, lay_out
from tljax.scale.mesh import make_mesh, mesh_of
from tljax.scale.rules import ShardingRules
from tljax.scale.table import ShardingTable

__all__ = ["Placement", "ShardingRules", "ShardingTable", "connect", "fetch", "lay_out", "make_mesh", "mesh_of"]
