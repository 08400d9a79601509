{{/* What the schema cannot say: values that do not go together. Each message names them. */}}

{{- define "pagoda.checks" -}}
{{- include "pagoda.securityChecks" . -}}
{{- $ranks := mul (int (.Values.engine.tensor_parallel_size | default 1)) (int (.Values.engine.pipeline_parallel_size | default 1)) -}}
{{- $sizes := printf "engine.tensor_parallel_size × engine.pipeline_parallel_size = %d" $ranks -}}
{{- $gpus := include "pagoda.gpus" . | int -}}
{{- if and (int .Values.resources.gpus) (ne $gpus (int .Values.resources.gpus)) -}}
{{- fail "resources: give GPUs by resources.gpus or by resources.claims, not both" -}}
{{- end -}}
{{- if and $gpus (eq (.Values.engine.device | default "cuda") "cpu") -}}
{{- fail "resources: engine.device = cpu uses no GPU, yet the pods ask for some: resources.gpus, resources.claims" -}}
{{- end -}}
{{- if and (not $gpus) (eq (.Values.engine.device | default "auto") "cuda") -}}
{{- fail "resources: engine.device = cuda needs GPUs: resources.gpus, or resources.claims with gpus" -}}
{{- end -}}
{{- range .Values.resources.claims -}}
{{- if eq (empty .resourceClaimName) (empty .resourceClaimTemplateName) -}}
{{- fail (printf "resources: resources.claims: %s needs one of resourceClaimName and resourceClaimTemplateName" .name) -}}
{{- end -}}
{{- end -}}
{{- include "pagoda.networkChecks" . -}}
{{- include "pagoda.modelChecks" . -}}
{{- include "pagoda.loraChecks" . -}}
{{- if eq .Values.mode "multiNode" -}}
{{- $nodes := int .Values.multiNode.nodes -}}
{{- $stages := int (.Values.engine.pipeline_parallel_size | default 1) -}}
{{- if mod $stages $nodes -}}
{{- fail (printf "multiNode: engine.pipeline_parallel_size = %d cannot be spread evenly over multiNode.nodes = %d; a stage never spans nodes" $stages $nodes) -}}
{{- end -}}
{{- if and (not $gpus) (ne $stages $nodes) -}}
{{- fail (printf "multiNode: without GPUs each pipeline stage has a pod of its own: engine.pipeline_parallel_size = %d must be multiNode.nodes = %d" $stages $nodes) -}}
{{- end -}}
{{- if and $gpus (ne (mul $gpus $nodes) $ranks) -}}
{{- fail (printf "resources: resources.gpus = %d × multiNode.nodes = %d must be %s" $gpus $nodes $sizes) -}}
{{- end -}}
{{- if gt (int (.Values.engine.data_parallel_size | default 1)) 1 -}}
{{- fail "multiNode: engine.data_parallel_size must be 1; replicas is the number of groups" -}}
{{- end -}}
{{- if not .Values.multiNode.ray.tokenSecret.name -}}
{{- fail "multiNode: multiNode.ray.tokenSecret.name is needed: kubectl create secret generic ray --from-literal=token=$(openssl rand -hex 32)" -}}
{{- end -}}
{{- if ne .Values.autoscaling.type "none" -}}
{{- fail "autoscaling: autoscaling.type must be none in mode multiNode; replicas is the number of groups" -}}
{{- end -}}
{{- if and .Values.rollout.partition (ge (int .Values.rollout.partition) (int .Values.replicas)) -}}
{{- fail "rollout: rollout.partition must be below replicas, or no group would be changed" -}}
{{- end -}}
{{- range list (int .Values.network.httpPort) (int .Values.network.grpcPort) 6379 -}}
{{- if and (ge . (int $.Values.multiNode.ray.firstPort)) (lt . (int (add $.Values.multiNode.ray.firstPort 100))) -}}
{{- fail (printf "multiNode: port %d is one of the 100 from multiNode.ray.firstPort on" .) -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $copies := int (.Values.engine.data_parallel_size | default 1) -}}
{{- if and $gpus (ne (mul $ranks $copies) $gpus) -}}
{{- fail (printf "resources: %s, times engine.data_parallel_size = %d, need as many GPUs, not %d (resources.gpus); over several pods only in mode multiNode" $sizes $copies $gpus) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.loraChecks" -}}
{{- with .Values.lora -}}
{{- if and .enabled .adapters .configMap -}}
{{- fail "lora: give one of lora.adapters and lora.configMap, not both" -}}
{{- end -}}
{{- if and (not .enabled) (or .claim.name .adapters .configMap) -}}
{{- fail "lora: lora.claim, lora.adapters and lora.configMap need lora.enabled" -}}
{{- end -}}
{{- range .adapters -}}
{{- if and (not (hasPrefix "/" .path)) (not $.Values.lora.claim.name) -}}
{{- fail (printf "lora: the path of lora.adapters: %s is in lora.claim, which has no name" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.modelChecks" -}}
{{- $source := include "pagoda.modelSource" . -}}
{{- if and (eq $source "storageInitializer") (not .Values.model.storageInitializer.image) -}}
{{- fail (printf "model: model.uri = %s needs model.storageInitializer.image, such as kserve/storage-initializer; hf://, pvc:// and oci:// need none" .Values.model.uri) -}}
{{- end -}}
{{- if and (hasPrefix "hf://" .Values.model.uri) (not (regexMatch "^\\w[\\w.-]*/\\w[\\w.-]*$" (include "pagoda.hubId" .))) -}}
{{- fail (printf "model: model.uri = %s must be hf://owner/name or hf://owner/name:revision" .Values.model.uri) -}}
{{- end -}}
{{- if and (eq $source "image") (eq .Values.security.podSecurityStandard "restricted") -}}
{{- fail "model: model.uri = oci://… is an image volume, which the Pod Security Standard restricted does not list: set security.podSecurityStandard to baseline where the namespace admits it" -}}
{{- end -}}
{{- if and .Values.model.revision (ne $source "hub") -}}
{{- fail "model: model.revision is of a Hugging Face model: model.hubId or model.uri = hf://owner/name" -}}
{{- end -}}
{{- with .Values.storage.cache -}}
{{- if and .claimName .claim.create -}}
{{- fail "storage: give storage.cache.claimName or storage.cache.claim.create=true, not both" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.networkChecks" -}}
{{- with .Values.network -}}
{{- if and .httpRoute.enabled (not .httpRoute.parentRefs) -}}
{{- fail "network: network.httpRoute.parentRefs is needed: the gateways, such as [{name: gateway, namespace: infra}]" -}}
{{- end -}}
{{- if and .inferencePool.enabled (not .inferencePool.endpointPicker.name) -}}
{{- fail "network: network.inferencePool.endpointPicker.name is needed: the Service of the endpoint picker" -}}
{{- end -}}
{{- if and (or .service.httpNodePort .service.grpcNodePort) (eq .service.type "ClusterIP") -}}
{{- fail "network: network.service.httpNodePort and grpcNodePort need network.service.type NodePort or LoadBalancer" -}}
{{- end -}}
{{- if eq (int (.service.httpPort | default .httpPort)) (int (.service.grpcPort | default .grpcPort)) -}}
{{- fail "network: the Service needs two ports: network.service.httpPort and network.service.grpcPort are equal" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What would open the server, or need more rights than the namespace is known to grant, is written down or refused. */}}
{{- define "pagoda.securityChecks" -}}
{{- $keys := .Values.security.apiKeysSecret.name -}}
{{- if and (not $keys) (not .Values.security.allowUnauthenticated) -}}
{{- fail "security: security.apiKeysSecret.name is needed: kubectl create secret generic clients --from-literal=api-keys=$(openssl rand -hex 32); security.allowUnauthenticated=true serves without keys" -}}
{{- end -}}
{{- if and $keys .Values.security.allowUnauthenticated -}}
{{- fail "security: give security.apiKeysSecret.name or security.allowUnauthenticated=true, not both" -}}
{{- end -}}
{{- $scrapes := .Values.monitoring.apiKeySecret.name -}}
{{- if and $keys (ne .Values.monitoring.monitor "none") (not $scrapes) (not (has "read" (.Values.engine.anonymous_scopes | default list))) -}}
{{- fail "monitoring: monitoring.apiKeySecret.name is needed: the Secret with the key that Prometheus sends, which has the scope read; engine.anonymous_scopes=[read] opens the metrics instead" -}}
{{- end -}}
{{- with .Values.network.policy -}}
{{- if and .enabled (not .from) (not .allowAllIngress) -}}
{{- fail "network: network.policy.from is needed: the peers that may come in, such as [{podSelector: {}}] for the release's namespace; network.policy.allowAllIngress=true lets everybody in" -}}
{{- end -}}
{{- if and .from .allowAllIngress -}}
{{- fail "network: give network.policy.from or network.policy.allowAllIngress=true, not both" -}}
{{- end -}}
{{- end -}}
{{- $standard := .Values.security.podSecurityStandard -}}
{{- if and (eq .Values.mode "multiNode") .Values.multiNode.rdma.resource (ne $standard "privileged") -}}
{{- fail (printf "security: multiNode.rdma.resource needs the capability IPC_LOCK, which security.podSecurityStandard = %s does not admit; set it to privileged, in a namespace that admits such pods" $standard) -}}
{{- end -}}
{{- $volumes := list "configMap" "csi" "downwardAPI" "emptyDir" "ephemeral" "persistentVolumeClaim" "projected" "secret" -}}
{{- range $volume := .Values.storage.extraVolumes -}}
{{- range $kind := keys (omit $volume "name") | sortAlpha -}}
{{- if or (and (eq $standard "restricted") (not (has $kind $volumes))) (and (eq $standard "baseline") (eq $kind "hostPath")) -}}
{{- fail (printf "security: storage.extraVolumes: %s, of volume %s, is not admitted by security.podSecurityStandard = %s" $kind $volume.name $standard) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
