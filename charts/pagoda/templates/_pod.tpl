{{/* Parts of a pod. Each takes the root context. */}}

{{/* What a pod has besides its containers. Takes a list: the root context, and for workers the number of their group. */}}
{{- define "pagoda.podSpec" -}}
{{- $place := . -}}
{{- with first . -}}
serviceAccountName: {{ include "pagoda.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service named pagoda would put PAGODA_PORT and the like into the environment.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "pagoda.terminationGracePeriodSeconds" . }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext: {{- include "pagoda.podSecurityContext" . | nindent 2 }}
{{- $initContainers := concat (include "pagoda.initContainers" . | fromYamlArray) (include "pagoda.lockedDown" (list . .Values.extraInitContainers) | fromYamlArray) }}
{{- with $initContainers }}
initContainers: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.resources.claims }}
resourceClaims:
  {{- range . }}
  - {{- omit . "request" "gpus" | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
volumes: {{- include (ternary "pagoda.serverVolumes" "pagoda.volumes" (eq (len $place) 1)) . | nindent 2 }}
{{- include "pagoda.placement" $place | trim | nindent 0 }}
{{- end -}}
{{- end -}}

{{- define "pagoda.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.fsGroup }}
fsGroup: {{ int64 .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pagoda.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The user's own containers: the chart's security context where they bring none. Takes the root context and the containers. */}}
{{- define "pagoda.lockedDown" -}}
{{- $context := dict "securityContext" (include "pagoda.containerSecurityContext" (index . 0) | fromYaml) -}}
{{- $containers := list -}}
{{- range index . 1 -}}
{{- $containers = append $containers (ternary . (merge (deepCopy .) $context) (hasKey . "securityContext")) -}}
{{- end -}}
{{- toYaml $containers -}}
{{- end -}}

{{/* Of a container with ranks: RDMA pins memory. "pagoda.securityChecks" admits it under `privileged` alone. */}}
{{- define "pagoda.rankSecurityContext" -}}
{{- $context := include "pagoda.containerSecurityContext" . | fromYaml -}}
{{- if and (eq .Values.mode "multiNode") .Values.multiNode.rdma.resource -}}
{{- $_ := set $context.capabilities "add" (list "IPC_LOCK") -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "pagoda.serverEnvironment" -}}
# For `kubectl exec … pagoda probe` and `pagoda doctor`, which then see what the server sees.
- name: PAGODA_CONFIG
  value: /etc/pagoda/pagoda.json
# For `${POD_IP}` in engine.kv_events_config.
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{ include "pagoda.environment" . }}
{{- end -}}

{{/* What every container needs that loads a model; ends without a newline. */}}
{{- define "pagoda.environment" -}}
{{- with .Values.model.hubTokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- if eq .Values.mode "multiNode" }}
{{ include "pagoda.rankEnvironment" . }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* GPUs of a pod, by whichever way they are asked for. */}}
{{- define "pagoda.gpus" -}}
{{- $gpus := int .Values.resources.gpus -}}
{{- range .Values.resources.claims -}}{{- $gpus = add $gpus (int .gpus) -}}{{- end -}}
{{- $gpus -}}
{{- end -}}

{{- define "pagoda.rankEnvironment" -}}
{{- with .Values.multiNode -}}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .ray.tokenSecret.name }}
      key: {{ .ray.tokenSecret.key }}
{{- with .networkInterface }}
- name: NCCL_SOCKET_IFNAME
  value: {{ . }}
- name: GLOO_SOCKET_IFNAME
  value: {{ . }}
{{- end }}
{{- range $name, $value := .nccl }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "pagoda.resources" -}}
{{- $limits := deepCopy .Values.resources.limits -}}
{{- if .Values.resources.gpus -}}
{{- $_ := set $limits .Values.resources.gpuResource (int .Values.resources.gpus) -}}
{{- end -}}
{{- if and (eq .Values.mode "multiNode") .Values.multiNode.rdma.resource -}}
{{- $_ := set $limits .Values.multiNode.rdma.resource (int .Values.multiNode.rdma.count) -}}
{{- end -}}
{{- $resources := dict "requests" .Values.resources.requests "limits" $limits -}}
{{- with .Values.resources.claims -}}
{{- $claims := list -}}
{{- range . -}}{{- $claims = append $claims (pick . "name" "request") -}}{{- end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The kubelet asks the server itself: no process is started in the pod, and the answers are the engine's state. */}}
{{- define "pagoda.probes" -}}
startupProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/ready") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.startup.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.startup.timeoutSeconds }}
  failureThreshold: {{ include "pagoda.startupFailureThreshold" . }}
readinessProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/ready") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.readiness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.readiness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.readiness.failureThreshold }}
livenessProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/live") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.liveness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.liveness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.liveness.failureThreshold }}
{{- end -}}

{{/* A worker speaks no HTTP; the command reads what the node and its ranks say of themselves. */}}
{{- define "pagoda.workerProbes" -}}
startupProbe:
  exec: {command: [pagoda, probe, startup, --rank]}
  periodSeconds: {{ int .Values.probes.startup.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.startup.timeoutSeconds }}
  failureThreshold: {{ include "pagoda.startupFailureThreshold" . }}
readinessProbe:
  exec: {command: [pagoda, probe, ready, --rank]}
  periodSeconds: {{ int .Values.probes.readiness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.readiness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.readiness.failureThreshold }}
livenessProbe:
  exec: {command: [pagoda, probe, live, --rank]}
  periodSeconds: {{ int .Values.probes.liveness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.liveness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.liveness.failureThreshold }}
{{- end -}}

{{- define "pagoda.probeTarget" -}}
path: {{ index . 1 }}
port: http1
scheme: {{ include "pagoda.scheme" (index . 0) | upper }}
{{- end -}}

{{- define "pagoda.serverVolumeMounts" -}}
- name: config
  mountPath: /etc/pagoda
  readOnly: true
{{- if .Values.network.tls.secretName }}
- name: tls
  mountPath: /etc/pagoda-tls
  readOnly: true
{{- end }}
{{- if .Values.security.apiKeysSecret.name }}
- name: api-keys
  mountPath: /etc/pagoda-keys
  readOnly: true
{{- end }}
{{- if include "pagoda.loraConfigMap" . }}
- name: lora
  mountPath: /etc/pagoda-lora
  readOnly: true
{{- end }}
{{ include "pagoda.volumeMounts" . }}
{{- end -}}

{{- define "pagoda.volumeMounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if ne (include "pagoda.modelVolume" .) "" }}
- name: model
  mountPath: /models
  readOnly: true
  {{- with (include "pagoda.modelClaim" . | fromYaml).path }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- if and .Values.lora.enabled .Values.lora.claim.name }}
- name: adapters
  mountPath: /adapters
  readOnly: true
  {{- with .Values.lora.claim.path }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.storage.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pagoda.serverVolumes" -}}
- name: config
  configMap:
    name: {{ include "pagoda.fullname" . }}
{{- with .Values.network.tls.secretName }}
- name: tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- with .Values.security.apiKeysSecret }}
{{- if .name }}
- name: api-keys
  secret:
    secretName: {{ .name }}
    defaultMode: 0440
    {{- with .key }}
    items:
      - key: {{ . }}
        path: {{ . }}
    {{- end }}
{{- end }}
{{- end }}
{{- with include "pagoda.loraConfigMap" . }}
- name: lora
  configMap:
    name: {{ . }}
{{- end }}
{{ include "pagoda.volumes" . }}
{{- end -}}

{{- define "pagoda.volumes" -}}
- name: cache
  {{- if or .Values.storage.cache.claimName .Values.storage.cache.claim.create }}
  persistentVolumeClaim:
    claimName: {{ .Values.storage.cache.claimName | default (include "pagoda.cacheClaimName" .) }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.storage.cache.sizeLimit }}
  {{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.storage.tmp.sizeLimit }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.resources.sharedMemory }}
{{- with include "pagoda.modelVolume" . }}
- name: model
  {{- . | nindent 2 }}
{{- end }}
{{- if and .Values.lora.enabled .Values.lora.claim.name }}
- name: adapters
  persistentVolumeClaim:
    claimName: {{ .Values.lora.claim.name }}
    readOnly: true
{{- end }}
{{- with .Values.storage.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pagoda.initContainers" -}}
{{- if eq (include "pagoda.modelSource" .) "storageInitializer" -}}
{{- with .Values.model.storageInitializer -}}
- name: model
  image: {{ .image }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  args: [{{ $.Values.model.uri | quote }}, /models]
  {{- with .env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .envFrom }}
  envFrom: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "pagoda.containerSecurityContext" $ | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: /models
    - name: tmp
      mountPath: /tmp
{{- end -}}
{{- else if eq (include "pagoda.modelSource" .) "initContainer" -}}
{{- with .Values.model.initContainer -}}
- name: model
  image: {{ .image }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  {{- with .command }}
  command: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .args }}
  args: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "pagoda.containerSecurityContext" $ | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: /models
    - name: tmp
      mountPath: /tmp
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes what podSpec takes. */}}
{{- define "pagoda.placement" -}}
{{- $place := . -}}
{{- with first . -}}
{{- with .Values.placement.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.placement.tolerations .Values.resources.gpus }}
tolerations:
  {{- if .Values.resources.gpus }}
  - key: {{ .Values.resources.gpuResource }}
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with .Values.placement.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
affinity:
  {{- if .Values.placement.affinity }}
  {{- toYaml .Values.placement.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{- include "pagoda.allPodLabels" . | nindent 14 }}
  {{- if and .Values.multiNode.topologyKey (eq (len $place) 2) }}
  # Where the group's head is.
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: {{ .Values.multiNode.topologyKey }}
        labelSelector:
          matchLabels:
            statefulset.kubernetes.io/pod-name: {{ include "pagoda.headName" . }}-{{ last $place }}
  {{- end }}
  {{- end }}
{{- if eq (len $place) 1 }}
{{- if .Values.placement.topologySpreadConstraints }}
{{- $selector := dict "labelSelector" (dict "matchLabels" (include "pagoda.selectorLabels" . | fromYaml)) }}
topologySpreadConstraints:
  {{- range .Values.placement.topologySpreadConstraints }}
  - {{- merge (deepCopy .) $selector | toYaml | nindent 4 }}
  {{- end }}
{{- else if .Values.placement.spreadOver }}
topologySpreadConstraints:
  {{- range .Values.placement.spreadOver }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "pagoda.selectorLabels" (first $place) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}
{{- with .Values.placement.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .Values.placement.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.placement.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}
{{- end -}}
